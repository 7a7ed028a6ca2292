#include "exit_ring_vmm.h"

#include <string.h>

#define LANE_OFFSET 1024u

_Static_assert(LANE_OFFSET >= sizeof(struct exit_ring_header) && LANE_OFFSET % 128 == 0, "lanes lie behind the header");

static uint64_t residency_offset(uint32_t vcpus)
{
	/* On a page of its own: the daemon's marking does not share lines with lanes. */
	return (LANE_OFFSET + (uint64_t)vcpus * sizeof(struct exit_ring_lane) + 4095) & ~4095ull;
}

uint64_t exit_ring_bytes(uint32_t vcpus, uint64_t residency_pages)
{
	if (vcpus == 0 || vcpus > EXIT_RING_VCPUS_MAX || residency_pages > EXIT_RING_RESIDENCY_MAX)
		return 0;
	return (residency_offset(vcpus) + (residency_pages + 63) / 64 * 8 + 4095) & ~4095ull;
}

void exit_ring_format(struct exit_ring_end *end, void *mem, uint32_t vcpus, uint64_t residency_pages, bool local)
{
	struct exit_ring_header *header = mem;

	end->header = header;
	end->residency = (uint64_t *)((char *)mem + residency_offset(vcpus));
	end->residency_pages = residency_pages;
	end->vcpus = vcpus;

	header->magic = EXIT_RING_MAGIC;
	header->version = EXIT_RING_VERSION;
	header->vcpus = vcpus;
	header->total_bytes = exit_ring_bytes(vcpus, residency_pages);
	header->features = (residency_pages ? EXIT_RING_RESIDENCY : 0) | (local ? EXIT_RING_LOCAL : 0);
	header->entries = EXIT_RING_ENTRIES;
	header->lane_bytes = sizeof(struct exit_ring_lane);
	header->lane_offset = LANE_OFFSET;
	header->residency_offset = residency_pages ? residency_offset(vcpus) : 0;
	header->residency_pages = residency_pages;
}

void exit_lane_init(struct exit_lane_end *end, const struct exit_ring_end *ring, uint32_t vcpu)
{
	memset(end, 0, sizeof(*end));
	end->header = ring->header;
	end->lane = (struct exit_ring_lane *)((char *)ring->header + LANE_OFFSET) + vcpu;
	end->vcpu = vcpu;
}

static void write_fault(struct exit_lane_end *end, uint64_t sequence, uint64_t gpa, uint32_t flags)
{
	struct exit_ring_fault *entry = &end->lane->fault[sequence % EXIT_RING_ENTRIES];

	EXIT_ENTRY_WRITE(entry->gpa, gpa);
	EXIT_ENTRY_WRITE(entry->sequence, sequence);
	EXIT_ENTRY_WRITE(entry->flags, flags);
	EXIT_ENTRY_WRITE(entry->vcpu, end->vcpu);
}

bool exit_lane_post(struct exit_lane_end *end, const uint64_t *gpa, uint32_t count, uint32_t flags)
{
	struct exit_ring_header *header = end->header;

	for (uint32_t i = 0; i < count; i++) {
		write_fault(end, end->sequence + i, gpa[i], flags);
		end->gpa[i] = gpa[i];
	}
	end->count = count;
	end->collected = 0;
	end->answered = 0;
	end->poisoned = false;
	__atomic_store_n(&end->lane->fault_head, (uint32_t)(end->sequence + count), __ATOMIC_RELEASE);
	/* Say, then look: the daemon arms, then looks at the pending bits. One of the two sees the other. */
	__atomic_fetch_or(&header->pending[end->vcpu / 64], 1ull << end->vcpu % 64, __ATOMIC_SEQ_CST);
	if (!__atomic_load_n(&header->armed, __ATOMIC_SEQ_CST))
		return false;
	/* Of all vCPUs that see it armed, one rings. */
	return __atomic_exchange_n(&header->armed, 0, __ATOMIC_SEQ_CST) != 0;
}

/* Check one completion and note it. False: nonsense. */
static bool take_completion(struct exit_lane_end *end, uint32_t index)
{
	const struct exit_ring_completion *entry = &end->lane->completion[index % EXIT_RING_ENTRIES];
	uint64_t nth = EXIT_ENTRY_READ(entry->sequence) - end->sequence;
	uint32_t status = EXIT_ENTRY_READ(entry->status);

	if (nth >= end->count || end->answered >> nth & 1 || status >= EXIT_STATUSES ||
	    EXIT_ENTRY_READ(entry->gpa) != end->gpa[nth] ||
	    EXIT_ENTRY_READ(entry->vcpu) != end->vcpu)
		return false;
	end->answered |= 1u << nth;
	end->poisoned |= status == EXIT_POISONED;
	return true;
}

/* The batch is over: let it go, which is what allows the daemon to forget it. */
static enum exit_lane_state finish_batch(struct exit_lane_end *end)
{
	end->sequence += end->count;
	end->count = 0;
	__atomic_store_n(&end->lane->done_tail, (uint32_t)end->sequence, __ATOMIC_RELEASE);
	return end->poisoned ? EXIT_LANE_POISONED : EXIT_LANE_IDLE;
}

enum exit_lane_state exit_lane_collect(struct exit_lane_end *end)
{
	uint32_t done, first = (uint32_t)end->sequence;

	if (!end->count)
		return EXIT_LANE_IDLE;
	done = __atomic_load_n(&end->lane->done_head, __ATOMIC_ACQUIRE) - first;
	if (done > end->count || done < end->collected)
		return EXIT_LANE_BROKEN;
	while (end->collected < done) {
		if (!take_completion(end, first + end->collected))
			return EXIT_LANE_BROKEN;
		end->collected++;
	}
	return end->collected == end->count ? finish_batch(end) : EXIT_LANE_WAITING;
}

bool exit_lane_has_news(const struct exit_lane_end *end)
{
	return __atomic_load_n(&end->lane->done_head, __ATOMIC_ACQUIRE) != (uint32_t)end->sequence + end->collected;
}

void exit_lane_abandon(struct exit_lane_end *end)
{
	end->count = 0;
}

uint32_t exit_lane_doze(struct exit_lane_end *end)
{
	uint32_t word = __atomic_load_n(&end->lane->wake, __ATOMIC_SEQ_CST);

	__atomic_store_n(&end->lane->sleeping, 1, __ATOMIC_SEQ_CST);
	return word;
}

void exit_lane_rouse(struct exit_lane_end *end)
{
	__atomic_store_n(&end->lane->sleeping, 0, __ATOMIC_RELAXED);
}

void exit_lane_nudge(struct exit_lane_end *end)
{
	__atomic_fetch_add(&end->lane->wake, 1, __ATOMIC_SEQ_CST);
}

bool exit_lane_enter(struct exit_lane_end *end)
{
	__atomic_store_n(&end->lane->installing, 1, __ATOMIC_SEQ_CST);
	/* Whoever holds looks at `installing` after changing this. A VMM that did not hand a file over finds UNSAID. */
	return __atomic_load_n(&end->header->local, __ATOMIC_SEQ_CST) == EXIT_LOCAL_OPEN;
}

bool exit_lane_leave(struct exit_lane_end *end)
{
	__atomic_store_n(&end->lane->installing, 0, __ATOMIC_SEQ_CST);
	return __atomic_load_n(&end->header->local, __ATOMIC_SEQ_CST) == EXIT_LOCAL_HELD;
}

void exit_ring_note_resident(const struct exit_ring_end *end, uint64_t page, uint64_t count)
{
	for (uint64_t at = page; at < page + count && at < end->residency_pages; at++)
		__atomic_fetch_or(&end->residency[at / 64], 1ull << at % 64, __ATOMIC_RELEASE);
}

bool exit_ring_is_resident(const struct exit_ring_end *end, uint64_t page)
{
	if (page >= end->residency_pages ||
	    !(__atomic_load_n(&end->header->accepted, __ATOMIC_ACQUIRE) & EXIT_RING_RESIDENCY))
		return false;
	return __atomic_load_n(&end->residency[page / 64], __ATOMIC_ACQUIRE) >> page % 64 & 1;
}

bool exit_ring_is_complete(const struct exit_ring_end *end)
{
	return __atomic_load_n(&end->header->state, __ATOMIC_SEQ_CST) == EXIT_RING_COMPLETE;
}
