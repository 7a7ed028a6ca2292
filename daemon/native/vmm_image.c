/* Memory content: written once by vmm_fill, compared byte for byte by vmm_check. Both use every CPU. */
#define _GNU_SOURCE
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "vmm.h"
#include "vmm_walk.h"

#define MAX_PARTS 8
/* Below 64 MiB a part, threads cost more than they bring. */
#define MIN_PART_PAGES 16384u

/* A range of pages and what is to be done with it. */
struct part {
	const struct vmm_shape *shape;
	uint8_t *memory;
	const uint8_t *image;
	const struct vmm_walk *walks;
	const uint8_t *removed;
	uint64_t from;
	uint64_t to;
	struct vmm_check_result result;
};

static enum walk_kind kind_at(const struct vmm_shape *shape, uint64_t page, uint64_t hash)
{
	enum walk_kind kind = walk_kind_of(hash);

	return kind == WALK_COUNTER && page >= walk_pages(shape) ? WALK_STATIC : kind;
}

static void write_page(uint64_t *words, uint64_t hash, enum walk_kind kind, uint64_t counter)
{
	for (uint64_t i = 0; i < VMM_PAGE_WORDS; i++)
		words[i] = walk_word(hash, i);
	if (kind == WALK_COUNTER) {
		words[0] = hash;
		words[1] = counter;
	}
}

static void fill_part(struct part *part)
{
	for (uint64_t page = part->from; page < part->to; page++) {
		uint64_t hash = walk_hash(page, part->shape->seed);
		enum walk_kind kind = kind_at(part->shape, page, hash);

		if (kind != WALK_ZERO)
			write_page((uint64_t *)(part->memory + page * VMM_PAGE), hash, kind, 0);
	}
}

/* The vCPU that owns `page`, searched from `vcpu` upwards, as pages ascend. */
static unsigned owner_from(const struct vmm_shape *shape, unsigned vcpu, uint64_t page, struct walk_slice *slice)
{
	while (vcpu + 1 < shape->vcpus && page >= slice->first + slice->pages)
		*slice = walk_slice_of(shape, ++vcpu);
	return vcpu;
}

static void note_mismatch(struct part *part, uint64_t page, const uint64_t *expected)
{
	const uint64_t *words = (const uint64_t *)(part->image + page * VMM_PAGE);
	uint32_t offset = 0;

	if (part->result.mismatched_pages++)
		return;
	while (offset < VMM_PAGE - 1 && ((const uint8_t *)words)[offset] == ((const uint8_t *)expected)[offset])
		offset++;
	part->result.first_page = page;
	part->result.first_offset = offset;
}

static void check_part(struct part *part)
{
	static const uint64_t zero[VMM_PAGE_WORDS];
	uint64_t buffer[VMM_PAGE_WORDS];
	struct walk_slice slice = walk_slice_of(part->shape, 0);
	unsigned vcpu = 0;

	for (uint64_t page = part->from; page < part->to; page++) {
		uint64_t hash = walk_hash(page, part->shape->seed);
		enum walk_kind kind = kind_at(part->shape, page, hash);
		const uint64_t *expected = buffer;
		uint64_t counter = 0;

		if (kind == WALK_ZERO || (part->removed && part->removed[page])) {
			expected = zero;
		} else {
			if (kind == WALK_COUNTER) {
				vcpu = owner_from(part->shape, vcpu, page, &slice);
				counter = walk_counter(&slice, &part->walks[vcpu], page - slice.first);
			}
			write_page(buffer, hash, kind, counter);
		}
		if (memcmp(part->image + page * VMM_PAGE, expected, VMM_PAGE) != 0)
			note_mismatch(part, page, expected);
	}
}

static void *part_main(void *arg)
{
	struct part *part = arg;

	if (part->image)
		check_part(part);
	else
		fill_part(part);
	return NULL;
}

static unsigned count_parts(uint64_t pages)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	uint64_t parts = pages / MIN_PART_PAGES;

	if (cpus > 0 && parts > (uint64_t)cpus)
		parts = (uint64_t)cpus;
	if (parts > MAX_PARTS)
		parts = MAX_PARTS;
	return parts ? (unsigned)parts : 1;
}

/* Split `whole` into ascending parts and work on all at once; the caller's thread does the first. */
static unsigned run_parts(const struct part *whole, struct part parts[MAX_PARTS])
{
	uint64_t pages = whole->shape->memory_bytes / VMM_PAGE;
	unsigned count = count_parts(pages);
	pthread_t threads[MAX_PARTS];
	int errors[MAX_PARTS] = {0};

	for (unsigned i = 0; i < count; i++) {
		parts[i] = *whole;
		parts[i].from = pages * i / count;
		parts[i].to = pages * (i + 1) / count;
		if (i > 0)
			errors[i] = pthread_create(&threads[i], NULL, part_main, &parts[i]);
	}
	part_main(&parts[0]);
	for (unsigned i = 1; i < count; i++) {
		if (errors[i])
			part_main(&parts[i]);
		else
			pthread_join(threads[i], NULL);
	}
	return count;
}

void vmm_fill(const struct vmm_shape *shape, uint8_t *memory)
{
	struct part whole = {.shape = shape, .memory = memory};
	struct part parts[MAX_PARTS];

	run_parts(&whole, parts);
}

void vmm_check(const struct vmm_shape *shape, const uint8_t *memory, const struct vmm_walk *walks,
	       const uint8_t *removed, struct vmm_check_result *result)
{
	struct part whole = {.shape = shape, .image = memory, .walks = walks, .removed = removed};
	struct part parts[MAX_PARTS];
	unsigned count = run_parts(&whole, parts);

	memset(result, 0, sizeof(*result));
	result->pages = shape->memory_bytes / VMM_PAGE;
	for (unsigned i = 0; i < count; i++) {
		if (result->mismatched_pages == 0 && parts[i].result.mismatched_pages) {
			result->first_page = parts[i].result.first_page;
			result->first_offset = parts[i].result.first_offset;
		}
		result->mismatched_pages += parts[i].result.mismatched_pages;
	}
}
