/* Content first, then the bit, then the wake: a vCPU that sees the bit clear must find the content.
 *
 * Populated pages are never written again, whatever was lost of our knowledge about them, since the guest may have changed
 * them. The file itself says so (EEXIST), CONTINUE does (it maps what is there and fails on what is not), and a set bit says
 * that no vCPU can have been there. Order of a death in between: a page that is written while its bit is set is written
 * again, with the same content, or answers EEXIST; then its bit is cleared.
 *
 * Source: ioctl_userfaultfd(2), UFFDIO_CONTINUE; Linux, "KVM: Introduce KVM Userfault" (proposed): populate, then clear the
 * bit with release ordering.
 */
#define _GNU_SOURCE
#include "edge_guest_memfd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE_BYTES 4096ull
#define NOWHERE UINT64_MAX

struct guest_memfd {
	struct guest_memfd *next;
	int uffd, file;
	bool armed;
	uint64_t *bits;
	size_t bitmap_bytes;
	uint32_t count;
	struct region region[];
};

static struct guest_memfd *opened;

static struct guest_memfd *find(int uffd)
{
	struct guest_memfd *g = opened;

	while (g && g->uffd != uffd)
		g = g->next;
	return g;
}

/* Where [hva, hva + len) lies in the file, if one region has all of it. */
static uint64_t offset_of(const struct guest_memfd *g, uint64_t hva, uint64_t len_bytes)
{
	for (const struct region *r = g->region; r < g->region + g->count; r++)
		if (hva - r->hva < r->len_bytes && len_bytes <= r->len_bytes - (hva - r->hva))
			return r->image_offset + (hva - r->hva);
	return NOWHERE;
}

static bool is_set(const struct guest_memfd *g, uint64_t offset)
{
	uint64_t bit = offset / PAGE_BYTES;

	return __atomic_load_n(&g->bits[bit / 64], __ATOMIC_RELAXED) >> bit % 64 & 1;
}

static void clear(struct guest_memfd *g, uint64_t offset, uint64_t len_bytes)
{
	uint64_t bit = offset / PAGE_BYTES, end = bit + len_bytes / PAGE_BYTES;

	if (!g->armed)
		return;
	while (bit < end) {
		uint64_t in_word = 64 - bit % 64 < end - bit ? 64 - bit % 64 : end - bit;
		uint64_t mask = (in_word == 64 ? UINT64_MAX : (1ull << in_word) - 1) << bit % 64;

		__atomic_fetch_and(&g->bits[bit / 64], ~mask, __ATOMIC_RELEASE);
		bit += in_word;
	}
}

static struct uffd_result done(uint64_t done_bytes, uint64_t len_bytes)
{
	return (struct uffd_result){ .answer = done_bytes == len_bytes ? UFFD_DONE : UFFD_PART, .done_bytes = done_bytes };
}

static struct uffd_result refused(int error)
{
	struct uffd_result r = { .error = error };

	r.answer = error == EEXIST			? UFFD_THERE :
		   error == EINTR || error == EAGAIN	? UFFD_AGAIN :
		   error == ENOMEM || error == ENOSPC	? UFFD_NO_MEMORY :
							  UFFD_UNEXPECTED;
	return r;
}

/* Write absent pages from their first on. Short: what follows is populated. */
static struct uffd_result populate(struct guest_memfd *g, uint64_t hva, uint64_t offset, const void *from, uint64_t len_bytes,
				   uint64_t asked_bytes)
{
	ssize_t n = pwrite(g->file, from, len_bytes, (off_t)offset);
	uint64_t whole = n < 0 ? 0 : (uint64_t)n & ~(PAGE_BYTES - 1);
	struct uffd_result r = whole ? done(whole, asked_bytes) : refused(n < 0 ? errno : EEXIST);

	if (r.answer == UFFD_THERE) {
		clear(g, offset, PAGE_BYTES);
	} else if (whole) {
		clear(g, offset, whole);
		/* Whoever waits on the userfaultfd faults again, now on a page that is there: CONTINUE is for that. */
		uffd_kernel.wake(g->uffd, hva, whole);
	}
	return r;
}

static struct uffd_result put(struct guest_memfd *g, uint64_t hva, const void *from, uint64_t len_bytes, bool look_first)
{
	uint64_t offset = offset_of(g, hva, len_bytes), run = PAGE_BYTES;
	struct uffd_result r;

	if (offset == NOWHERE)
		return (struct uffd_result){ .answer = UFFD_UNMAPPED, .error = ENOENT };
	if (look_first || !g->armed || !is_set(g, offset)) {
		r = uffd_kernel.install(g->uffd, UFFD_OP_CONTINUE, hva, 0, PAGE_BYTES);
		if (r.answer == UFFD_DONE || r.answer == UFFD_THERE)
			clear(g, offset, PAGE_BYTES);
		if (r.answer == UFFD_DONE)
			return done(PAGE_BYTES, len_bytes);
		if (r.answer != UFFD_NO_PAGE)
			return r;
	} else {
		while (run < len_bytes && is_set(g, offset + run))
			run += PAGE_BYTES;
	}
	return populate(g, hva, offset, from, run, len_bytes);
}

static struct uffd_result install(int uffd, enum uffd_op op, uint64_t dst, uint64_t src, uint64_t len_bytes)
{
	static const char zero[PAGE_BYTES];
	struct guest_memfd *g = find(uffd);

	if (!g)
		return refused(EBADF);
	switch (op) {
	case UFFD_OP_COPY:
		return put(g, dst, (const void *)(uintptr_t)src, len_bytes, false);
	case UFFD_OP_ZEROPAGE:
		/* Also asked for where a page is there already, whose bit may be set again by whoever set it. */
		return len_bytes == PAGE_BYTES ? put(g, dst, zero, PAGE_BYTES, true) : refused(EINVAL);
	case UFFD_OP_CONTINUE:
		return uffd_kernel.install(uffd, op, dst, 0, len_bytes);
	default:
		/* Poison lies in the VMM's page tables, which KVM does not look at for a guest_memfd: it would read zeros. */
		return refused(EOPNOTSUPP);
	}
}

static int wake(int uffd, uint64_t start, uint64_t len_bytes)
{
	return uffd_kernel.wake(uffd, start, len_bytes);
}

static int unprotect(int uffd, uint64_t start, uint64_t len_bytes)
{
	return uffd_kernel.unprotect(uffd, start, len_bytes);
}

/* The end: what is zero is a hole in the file, which the kernel fills, if the vCPUs may only go there. */
static int unregister(int uffd, uint64_t start, uint64_t len_bytes)
{
	struct guest_memfd *g = find(uffd);
	uint64_t offset = g ? offset_of(g, start, len_bytes) : NOWHERE;

	if (offset != NOWHERE)
		clear(g, offset, len_bytes);
	return uffd_kernel.unregister(uffd, start, len_bytes);
}

static ssize_t read_messages(int uffd, struct uffd_msg *messages, size_t len_bytes)
{
	return uffd_kernel.read(uffd, messages, len_bytes);
}

static bool is_changing(int uffd, uint64_t start, uint64_t len_bytes)
{
	return uffd_kernel.is_changing(uffd, start, len_bytes);
}

static const struct uffd_edge edge = {
	.install = install,
	.wake = wake,
	.unprotect = unprotect,
	.unregister = unregister,
	.read = read_messages,
	.is_changing = is_changing,
};

const struct uffd_edge *guest_memfd_edge(void)
{
	return &edge;
}

/* Map the bitmap once it cannot be shrunk any more, or a VMM could have us read behind its end. */
static int map_bits(struct guest_memfd *g, int bitmap)
{
	uint64_t end = 0;
	struct stat status;
	int seals = fcntl(bitmap, F_GET_SEALS);

	if (seals < 0 || (!(seals & F_SEAL_SHRINK) && fcntl(bitmap, F_ADD_SEALS, F_SEAL_SHRINK)))
		return EPERM;
	if (fstat(bitmap, &status))
		return errno;
	for (const struct region *r = g->region; r < g->region + g->count; r++)
		if (r->image_offset + r->len_bytes > end)
			end = r->image_offset + r->len_bytes;
	g->bitmap_bytes = (end / PAGE_BYTES + 63) / 64 * sizeof(*g->bits);
	if ((uint64_t)status.st_size < g->bitmap_bytes)
		return ERANGE;
	g->bits = mmap(NULL, g->bitmap_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, bitmap, 0);
	return g->bits == MAP_FAILED ? errno : 0;
}

struct guest_memfd *guest_memfd_open(int uffd, int file, int bitmap, const struct region *regions, uint32_t count, int *error)
{
	struct guest_memfd *g = calloc(1, sizeof(*g) + count * sizeof(*regions));

	*error = ENOMEM;
	if (!g)
		return NULL;
	g->uffd = uffd;
	g->file = file;
	g->count = count;
	memcpy(g->region, regions, count * sizeof(*regions));
	*error = state_number_pages(g->region, count) ? map_bits(g, bitmap) : EINVAL;
	if (*error) {
		free(g);
		return NULL;
	}
	g->next = opened;
	opened = g;
	return g;
}

void guest_memfd_close(struct guest_memfd *g)
{
	struct guest_memfd **at = &opened;

	while (*at != g)
		at = &(*at)->next;
	*at = g->next;
	munmap(g->bits, g->bitmap_bytes);
	free(g);
}

void guest_memfd_arm(struct guest_memfd *g, const struct ledger *ledger)
{
	g->armed = true;
	for (const struct region *r = g->region; r < g->region + g->count; r++) {
		uint64_t page = r->first_page, end = page + r->len_bytes / PAGE_BYTES;

		while ((page = ledger_find(ledger, PAGE_PRESENT, page, end)) < end) {
			uint64_t run = ledger_run(ledger, 1u << PAGE_PRESENT, page, end);

			clear(g, r->image_offset + (page - r->first_page) * PAGE_BYTES, run * PAGE_BYTES);
			page += run;
		}
	}
}
