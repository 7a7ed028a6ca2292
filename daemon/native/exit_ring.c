#define _GNU_SOURCE
#include "exit_ring.h"

#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Shared memory is read and written by these only: each access happens exactly once, and in the order that it names. */
#define READ_RELAXED(place) __atomic_load_n(&(place), __ATOMIC_RELAXED)
#define READ_ACQUIRE(place) __atomic_load_n(&(place), __ATOMIC_ACQUIRE)
#define WRITE_RELEASE(place, value) __atomic_store_n(&(place), (value), __ATOMIC_RELEASE)

#define SLOT(index) ((index) % EXIT_RING_ENTRIES)

/* Tries to read two indices that the VMM may move between the reads. While nothing is completed it can do so once. */
#define SNAPSHOT_TRIES 4

static struct exit_ring_lane *lane_of(const struct exit_ring *ring, uint32_t vcpu)
{
	return (struct exit_ring_lane *)((char *)ring->header + ring->lane_offset + (uint64_t)vcpu * ring->lane_bytes);
}

/* Whether [offset, offset + len) lies behind the header and within `total`, aligned to a cache line. */
static bool section_fits(uint64_t offset, uint64_t len, uint64_t total)
{
	return offset >= sizeof(struct exit_ring_header) && offset % 64 == 0 && offset <= total && len <= total - offset;
}

/* Check the copied geometry; nothing here is read from shared memory. */
static int check_geometry(const struct exit_ring_header *seen, size_t len)
{
	uint64_t lanes = (uint64_t)seen->vcpus * seen->lane_bytes, residency = (seen->residency_pages + 63) / 64 * 8;

	if (seen->magic != EXIT_RING_MAGIC)
		return EXIT_RING_NOT_RING;
	if (seen->version != EXIT_RING_VERSION)
		return EXIT_RING_OTHER_VERSION;
	if (seen->features & ~EXIT_RING_FEATURES)
		return EXIT_RING_OTHER_FEATURES;
	if (seen->total_bytes > len)
		return EXIT_RING_TOO_SMALL;
	if (seen->vcpus == 0 || seen->vcpus > EXIT_RING_VCPUS_MAX || seen->entries != EXIT_RING_ENTRIES ||
	    seen->lane_bytes < sizeof(struct exit_ring_lane) || seen->lane_bytes % 64 || seen->lane_bytes > 1u << 16 ||
	    !section_fits(seen->lane_offset, lanes, seen->total_bytes))
		return EXIT_RING_BAD_GEOMETRY;
	if (!(seen->features & EXIT_RING_RESIDENCY))
		return EXIT_RING_OK;
	if (seen->residency_pages > EXIT_RING_RESIDENCY_MAX ||
	    !section_fits(seen->residency_offset, residency, seen->total_bytes) ||
	    (seen->residency_offset < seen->lane_offset + lanes && seen->lane_offset < seen->residency_offset + residency))
		return EXIT_RING_BAD_GEOMETRY;
	return EXIT_RING_OK;
}

static void wake_vcpu(struct exit_ring *ring, struct exit_ring_lane *lane)
{
	/* Both in the one order of all sequentially consistent operations, as is the vCPU's announcement that it sleeps: either
	 * it sees this increment (the kernel compares the word), or we see its announcement. */
	__atomic_fetch_add(&lane->wake, 1, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&lane->sleeping, __ATOMIC_SEQ_CST)) {
		syscall(SYS_futex, &lane->wake, FUTEX_WAKE, 1, NULL, NULL, 0);
		ring->wakes++;
	}
}

/* Which faults of the lane's batch have their completion already. */
static int find_completed(const struct exit_lane *lane, const struct exit_ring_lane *shared, uint16_t *completed)
{
	*completed = 0;
	for (uint32_t i = lane->released; i != lane->done; i++) {
		uint32_t index = (uint32_t)EXIT_ENTRY_READ(shared->completion[SLOT(i)].sequence);

		if (index - lane->released >= lane->head - lane->released || *completed >> SLOT(index) & 1)
			return EXIT_RING_INDEX;
		*completed |= (uint16_t)(1u << SLOT(index));
	}
	return EXIT_RING_OK;
}

/* Take over a lane as it is: fresh, or left by a daemon that died with a batch under way. */
static int adopt_lane(struct exit_ring *ring, uint32_t vcpu)
{
	struct exit_ring_lane *shared = lane_of(ring, vcpu);
	struct exit_lane *lane = &ring->lane[vcpu];
	int error;

	for (int try = 0; try < SNAPSHOT_TRIES; try++) {
		lane->released = READ_ACQUIRE(shared->done_tail);
		lane->head = READ_ACQUIRE(shared->fault_head);
		if (READ_ACQUIRE(shared->done_tail) == lane->released)
			break;
	}
	lane->done = READ_ACQUIRE(shared->done_head);
	lane->taken = lane->released;
	if (lane->head - lane->released > EXIT_RING_ENTRIES || lane->done - lane->released > lane->head - lane->released)
		return EXIT_RING_INDEX;
	error = find_completed(lane, shared, &lane->skip);
	if (error)
		return error;
	/* The dead one may have published the last answer and not woken. */
	wake_vcpu(ring, shared);
	return EXIT_RING_OK;
}

static int adopt_lanes(struct exit_ring *ring)
{
	for (uint32_t vcpu = 0; vcpu < ring->vcpus; vcpu++) {
		int error = adopt_lane(ring, vcpu);

		if (error)
			return error;
		ring->backlog[vcpu / 64] |= 1ull << vcpu % 64;
	}
	return EXIT_RING_OK;
}

/* Awake: rings would be for nothing. One that is under way does no harm. */
static void disarm(struct exit_ring *ring)
{
	if (READ_RELAXED(ring->header->armed))
		__atomic_store_n(&ring->header->armed, 0, __ATOMIC_RELAXED);
}

int exit_ring_attach(struct exit_ring *ring, void *mem, size_t len)
{
	struct exit_ring_header seen;
	int error;

	if (len < sizeof(seen))
		return EXIT_RING_TOO_SMALL;
	memcpy(&seen, mem, offsetof(struct exit_ring_header, accepted));
	/* Without this the compiler may read `mem` again where `seen` is checked. */
	__asm__ volatile("" ::: "memory");
	error = check_geometry(&seen, len);
	if (error)
		return error;
	memset(ring, 0, sizeof(*ring));
	ring->header = mem;
	ring->len = len;
	ring->lane_offset = seen.lane_offset;
	ring->lane_bytes = seen.lane_bytes;
	ring->vcpus = seen.vcpus;
	ring->features = seen.features & EXIT_RING_FEATURES;
	if (ring->features & EXIT_RING_RESIDENCY) {
		ring->residency = (uint64_t *)((char *)mem + seen.residency_offset);
		ring->residency_pages = seen.residency_pages;
	}
	ring->lane = calloc(seen.vcpus, sizeof(*ring->lane));
	if (!ring->lane)
		return EXIT_RING_NO_MEMORY;
	error = adopt_lanes(ring);
	if (error) {
		exit_ring_detach(ring);
		return error;
	}
	disarm(ring);
	WRITE_RELEASE(ring->header->accepted, ring->features & ~EXIT_RING_LOCAL);
	/* An earlier daemon allowed it, and vCPUs may be in the middle of it now. */
	if (READ_RELAXED(ring->header->local) != EXIT_LOCAL_UNSAID)
		exit_ring_allow_local(ring);
	return EXIT_RING_OK;
}

void exit_ring_detach(struct exit_ring *ring)
{
	free(ring->lane);
	ring->lane = NULL;
	ring->header = NULL;
	ring->vcpus = 0;
}

void exit_ring_allow_local(struct exit_ring *ring)
{
	if (!(ring->features & EXIT_RING_LOCAL) || READ_RELAXED(ring->header->local) == EXIT_LOCAL_SHUT)
		return;
	ring->local = true;
	__atomic_store_n(&ring->header->local, (uint32_t)EXIT_LOCAL_HELD, __ATOMIC_SEQ_CST);
	WRITE_RELEASE(ring->header->accepted, ring->features);
}

/* Store, then look: a vCPU says that it installs, then looks at `local`. In the one order of sequentially consistent operations
 * one of the two sees the other. */
bool exit_ring_hold(struct exit_ring *ring)
{
	if (!ring->local)
		return true;
	__atomic_store_n(&ring->header->local, (uint32_t)EXIT_LOCAL_HELD, __ATOMIC_SEQ_CST);
	for (uint32_t vcpu = 0; vcpu < ring->vcpus; vcpu++)
		if (__atomic_load_n(&lane_of(ring, vcpu)->installing, __ATOMIC_SEQ_CST))
			return false;
	return true;
}

void exit_ring_open(struct exit_ring *ring)
{
	if (ring->local)
		__atomic_store_n(&ring->header->local, (uint32_t)EXIT_LOCAL_OPEN, __ATOMIC_SEQ_CST);
}

void exit_ring_shut(struct exit_ring *ring)
{
	if (!ring->local)
		return;
	ring->local = false;
	__atomic_store_n(&ring->header->local, (uint32_t)EXIT_LOCAL_SHUT, __ATOMIC_SEQ_CST);
}

/* Move the VMM's pending bits into the backlog. */
static int take_pending(struct exit_ring *ring)
{
	for (uint32_t w = 0; w < EXIT_RING_PENDING_WORDS; w++) {
		uint64_t known = w < ring->vcpus / 64 ? ~0ull : w > ring->vcpus / 64 ? 0 : (1ull << ring->vcpus % 64) - 1;
		uint64_t bits = READ_RELAXED(ring->header->pending[w]);

		if (!bits)
			continue;
		bits = __atomic_exchange_n(&ring->header->pending[w], 0, __ATOMIC_SEQ_CST);
		if (bits & ~known)
			return EXIT_RING_VCPU;
		ring->backlog[w] |= bits;
	}
	return EXIT_RING_OK;
}

/* Read the VMM's indices of a lane and check that they moved as they may. */
static int look_at_lane(struct exit_lane *lane, const struct exit_ring_lane *shared)
{
	/* In this order: done_tail is then at least as new as the batch that fault_head belongs to. */
	uint32_t head = READ_ACQUIRE(shared->fault_head), released = READ_ACQUIRE(shared->done_tail);

	if (released != lane->released) {
		/* The batch was let go, which may be done when all of it was answered. */
		if (released != lane->done || lane->owed || lane->done != lane->head)
			return EXIT_RING_INDEX;
		lane->skip = 0;
		/* Already so, unless the batch was adopted whole and never looked at. */
		lane->taken = released;
	}
	if (head - lane->head > EXIT_RING_ENTRIES || head - released > EXIT_RING_ENTRIES)
		return EXIT_RING_INDEX;
	lane->released = released;
	lane->head = head;
	return EXIT_RING_OK;
}

/* Copy one entry, each field once, and check the copy. */
static int copy_fault(const struct exit_ring_lane *shared, uint32_t vcpu, uint32_t index, struct exit_fault *out)
{
	const struct exit_ring_fault *entry = &shared->fault[SLOT(index)];

	out->gpa = EXIT_ENTRY_READ(entry->gpa);
	out->sequence = EXIT_ENTRY_READ(entry->sequence);
	out->flags = EXIT_ENTRY_READ(entry->flags);
	out->vcpu = EXIT_ENTRY_READ(entry->vcpu);
	if (out->vcpu != vcpu)
		return EXIT_RING_VCPU;
	if ((uint32_t)out->sequence != index || out->gpa % 4096 || out->flags & ~EXIT_FAULT_FLAGS)
		return EXIT_RING_RECORD;
	return EXIT_RING_OK;
}

/* Take what a lane has, at most `max`; *count says how many. */
static int take_lane(struct exit_ring *ring, uint32_t vcpu, struct exit_fault *out, unsigned max, unsigned *count)
{
	struct exit_ring_lane *shared = lane_of(ring, vcpu);
	struct exit_lane *lane = &ring->lane[vcpu];
	int error = look_at_lane(lane, shared);

	*count = 0;
	while (!error && lane->taken != lane->head && *count < max) {
		uint32_t slot = SLOT(lane->taken);

		if (lane->skip >> slot & 1) {
			lane->taken++;
			continue;
		}
		error = copy_fault(shared, vcpu, lane->taken, &out[*count]);
		if (error)
			break;
		lane->gpa[slot] = out[*count].gpa;
		lane->sequence[slot] = out[*count].sequence;
		lane->owed |= (uint16_t)(1u << slot);
		lane->taken++;
		++*count;
	}
	WRITE_RELEASE(shared->fault_tail, lane->taken);
	ring->faults += *count;
	return error;
}

/* The next vCPU at or behind `from` with a backlog, or ring->vcpus. */
static uint32_t next_backlog(const struct exit_ring *ring, uint32_t from)
{
	for (uint32_t w = from / 64; w < EXIT_RING_PENDING_WORDS && w * 64 < ring->vcpus; w++) {
		uint64_t bits = ring->backlog[w];

		if (w == from / 64)
			bits &= ~0ull << from % 64;
		if (bits)
			return w * 64 + (uint32_t)__builtin_ctzll(bits);
	}
	return ring->vcpus;
}

int exit_ring_drain(struct exit_ring *ring, struct exit_fault *out, unsigned max, unsigned *count)
{
	bool wrapped = false;
	int error;

	disarm(ring);
	error = take_pending(ring);
	*count = 0;
	while (!error && *count < max) {
		uint32_t vcpu = next_backlog(ring, ring->cursor);
		unsigned taken;

		if (vcpu == ring->vcpus) {
			if (wrapped)
				break;
			wrapped = true;
			ring->cursor = 0;
			continue;
		}
		error = take_lane(ring, vcpu, out + *count, max - *count, &taken);
		*count += taken;
		ring->cursor = vcpu;
		if (ring->lane[vcpu].taken == ring->lane[vcpu].head) {
			ring->backlog[vcpu / 64] &= ~(1ull << vcpu % 64);
			ring->cursor = vcpu + 1 < ring->vcpus ? vcpu + 1 : 0;
			wrapped |= ring->cursor == 0;
		}
	}
	return error;
}

bool exit_ring_arm(struct exit_ring *ring)
{
	if (next_backlog(ring, 0) != ring->vcpus)
		return false;
	/* Store, then look: a vCPU sets its bit, then looks at `armed`. In the one order of sequentially consistent operations one
	 * of the two sees the other. */
	__atomic_store_n(&ring->header->armed, 1, __ATOMIC_SEQ_CST);
	for (uint32_t w = 0; w < EXIT_RING_PENDING_WORDS && w * 64 < ring->vcpus; w++) {
		if (!__atomic_load_n(&ring->header->pending[w], __ATOMIC_SEQ_CST))
			continue;
		__atomic_store_n(&ring->header->armed, 0, __ATOMIC_SEQ_CST);
		return false;
	}
	return true;
}

int exit_ring_complete(struct exit_ring *ring, uint32_t vcpu, uint64_t gpa, uint64_t sequence, uint32_t status)
{
	uint32_t slot = SLOT((uint32_t)sequence);
	struct exit_ring_completion *entry;
	struct exit_ring_lane *shared;
	struct exit_lane *lane;

	if (vcpu >= ring->vcpus)
		return EXIT_RING_NOT_OWED;
	lane = &ring->lane[vcpu];
	if (!(lane->owed >> slot & 1) || lane->sequence[slot] != sequence || lane->gpa[slot] != gpa)
		return EXIT_RING_NOT_OWED;
	/* There is room: a batch has at most EXIT_RING_ENTRIES faults, and each is completed once. */
	shared = lane_of(ring, vcpu);
	entry = &shared->completion[SLOT(lane->done)];
	EXIT_ENTRY_WRITE(entry->gpa, gpa);
	EXIT_ENTRY_WRITE(entry->sequence, sequence);
	EXIT_ENTRY_WRITE(entry->status, status);
	EXIT_ENTRY_WRITE(entry->vcpu, vcpu);
	lane->owed &= (uint16_t)~(1u << slot);
	lane->done++;
	WRITE_RELEASE(shared->done_head, lane->done);
	ring->completions++;
	if (lane->done == lane->head)
		wake_vcpu(ring, shared);
	return EXIT_RING_OK;
}

void exit_ring_mark(struct exit_ring *ring, uint64_t first_page, uint64_t count, bool resident)
{
	uint64_t end, page = first_page;

	if (first_page >= ring->residency_pages)
		return;
	end = count < ring->residency_pages - first_page ? first_page + count : ring->residency_pages;
	while (page < end) {
		uint64_t in_word = 64 - page % 64, run = end - page < in_word ? end - page : in_word;
		uint64_t bits = (run == 64 ? ~0ull : (1ull << run) - 1) << page % 64;

		/* Release: who sees the bit sees the page's content. */
		if (resident)
			__atomic_fetch_or(&ring->residency[page / 64], bits, __ATOMIC_RELEASE);
		else
			__atomic_fetch_and(&ring->residency[page / 64], ~bits, __ATOMIC_RELEASE);
		page += run;
	}
}

void exit_ring_set_complete(struct exit_ring *ring)
{
	__atomic_store_n(&ring->header->state, (uint32_t)EXIT_RING_COMPLETE, __ATOMIC_SEQ_CST);
	/* A vCPU may have posted after the last drain; it needs no answer any more, but it must look. */
	for (uint32_t vcpu = 0; vcpu < ring->vcpus; vcpu++)
		wake_vcpu(ring, lane_of(ring, vcpu));
}

const char *exit_ring_error_text(int error)
{
	switch (error) {
	case EXIT_RING_OK:
		return "the exit ring is sound";
	case EXIT_RING_NOT_MEMFD:
		return "what was handed over as exit ring is no memfd of ordinary pages that can be mapped for writing";
	case EXIT_RING_NOT_SEALED:
		return "the exit ring's memfd is not sealed against shrinking, growing and further seals";
	case EXIT_RING_TOO_SMALL:
		return "the exit ring's memfd is shorter than its header says, or of an impossible length";
	case EXIT_RING_NOT_RING:
		return "the exit ring does not begin with its magic number";
	case EXIT_RING_OTHER_VERSION:
		return "the exit ring is of a version that is not served here";
	case EXIT_RING_OTHER_FEATURES:
		return "the exit ring needs a feature that is not served here";
	case EXIT_RING_BAD_GEOMETRY:
		return "the exit ring's sections do not fit its memory";
	case EXIT_RING_INDEX:
		return "an index of the exit ring jumped, or a lane has more faults than it holds";
	case EXIT_RING_VCPU:
		return "the exit ring names a vCPU that was not announced";
	case EXIT_RING_RECORD:
		return "a fault in the exit ring contradicts itself: sequence, alignment or flags";
	case EXIT_RING_NOT_OWED:
		return "a fault was completed that is not outstanding";
	case EXIT_RING_NO_MEMORY:
		return "there is no memory to map the exit ring";
	default:
		return "unknown";
	}
}
