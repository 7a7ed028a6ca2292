/* Faults that vCPUs report as exits: the same ledger and waiters as messages, another way in and another way to wake.
 *
 * An exit's waiter has WAITER_EXIT and the vCPU's number for a thread id. When its page is answered the waiters call
 * on_answered, which completes the vCPU's faults on that page; the ring wakes the vCPU with the last of its batch.
 *
 * Exits that the VMM forwards in messages come one by one and are answered in batches: answers gather until they are taken.
 * Accepted but not taken are at most ANSWERS_MAX, so there is always room for an answer.
 */
#include "crash.h"
#include "pager.h"

#include <string.h>

#define FAULTS_AT_ONCE 128u
#define EXIT_ROUNDS 8

static uint64_t image_page(const struct pager *p, uint64_t page)
{
	return region_offset_of_page(pager_region_of_page(p, page), page) >> EXIT_RING_PAGE_SHIFT;
}

/* Tell the VMM which pages it need not ask for. [first, first + count) lies in one region. */
void pager_mark_resident(struct pager *p, uint64_t first, uint64_t count, bool resident)
{
	unsigned shift;

	if (!p->ring || count == 0)
		return;
	shift = pager_region_of_page(p, first)->page_shift - EXIT_RING_PAGE_SHIFT;
	exit_ring_mark(p->ring, image_page(p, first), count << shift, resident);
}

static void on_answered(void *context, const struct waiter *entry)
{
	struct pager *p = context;
	uint32_t vcpu = entry->tid & ~WAITER_EXIT;
	const struct region *region = pager_region_of_page(p, entry->page);
	uint64_t gpa = region->gpa + ((entry->page - region->first_page) << region->page_shift);
	const struct exit_lane *lane;

	if (!p->ring || vcpu >= p->ring->vcpus)
		return;
	lane = &p->ring->lane[vcpu];
	/* A vCPU may have asked for several parts of a huge page. */
	for (uint32_t slot = 0; slot < EXIT_RING_ENTRIES; slot++)
		if (lane->owed >> slot & 1 && (lane->gpa[slot] - gpa) >> region->page_shift == 0) {
			exit_ring_complete(p->ring, vcpu, lane->gpa[slot], lane->sequence[slot],
					   p->poisoned ? EXIT_POISONED : EXIT_RESOLVED);
			CRASH_POINT("exits.answered");
		}
}

static void on_forwarded_answered(void *context, const struct waiter *entry)
{
	struct pager *p = context;

	p->answer[p->answers++] = (struct pager_answer){
		.page = entry->page,
		.len_bytes = 1ull << pager_region_of_page(p, entry->page)->page_shift,
		.vcpu = entry->tid & ~WAITER_EXIT,
		.zero = ledger_state(&p->ledger, entry->page) == PAGE_ZERO,
	};
	p->signals |= PAGER_ANSWERS;
}

static const struct region *region_at_gpa(const struct pager *p, uint64_t gpa)
{
	for (uint32_t i = 0; i < p->state->regions; i++)
		if (p->region[i].gpa != REGION_NO_GPA && gpa - p->region[i].gpa < p->region[i].len_bytes)
			return &p->region[i];
	return NULL;
}

static void break_ring(struct pager *p, int error)
{
	/* Its vCPUs wait on: what a broken ring asks for cannot be told from nonsense. */
	p->ring_error = error;
	exit_ring_shut(p->ring);
	exit_ring_detach(p->ring);
	p->ring = NULL;
	p->signals |= PAGER_RING_BROKEN;
}

static bool on_exit_fault(struct pager *p, const struct exit_fault *fault, uint64_t now_ns)
{
	const struct region *region = region_at_gpa(p, fault->gpa);
	uint64_t page;

	if (!region) {
		break_ring(p, EXIT_RING_OUTSIDE);
		return false;
	}
	page = region->first_page + ((fault->gpa - region->gpa) >> region->page_shift);
	p->counters->exits++;
	pager_on_waiter(p, page, WAITER_EXIT | fault->vcpu, now_ns);
	return true;
}

/* Act on what the ring holds, then ask for the doorbell. */
void pager_drain_exits(struct pager *p)
{
	uint64_t now_ns = pager_now_ns();

	for (int round = 0; p->ring && round < EXIT_ROUNDS; round++) {
		struct exit_fault fault[FAULTS_AT_ONCE];
		unsigned count = 0, room = waiters_room(&p->waiters);
		int error;

		if (room == 0) {
			p->signals |= PAGER_STALLED;
			return;
		}
		error = exit_ring_drain(p->ring, fault, room < FAULTS_AT_ONCE ? room : FAULTS_AT_ONCE, &count);
		if (count)
			CRASH_POINT("exits.taken");
		for (unsigned i = 0; i < count; i++)
			if (!on_exit_fault(p, &fault[i], now_ns))
				return;
		if (error) {
			break_ring(p, error);
			return;
		}
		if (count == 0 && exit_ring_arm(p->ring))
			return;
	}
	if (p->ring)
		p->signals |= PAGER_MORE;
}

unsigned pager_on_doorbell(struct pager *p, int doorbell)
{
	if (p->ring && !exit_ring_quiet(doorbell))
		break_ring(p, EXIT_RING_NOT_MEMFD);
	return pager_drain(p);
}

int pager_attach_ring(struct pager *p, void *mem, size_t len, bool local)
{
	int error = exit_ring_attach(&p->ring_memory, mem, len);
	uint64_t page = 0;

	if (error)
		return error;
	p->ring = &p->ring_memory;
	if (local)
		exit_ring_allow_local(p->ring);
	p->waiters.answered = on_answered;
	p->waiters.context = p;
	while (page < p->ledger.pages) {
		const struct region *region;
		uint64_t run, end;

		page = ledger_find(&p->ledger, PAGE_PRESENT, page, p->ledger.pages);
		if (page == p->ledger.pages)
			break;
		region = pager_region_of_page(p, page);
		end = region_end_page(region);
		run = ledger_run(&p->ledger, 1u << PAGE_PRESENT, page, end);
		pager_mark_resident(p, page, run, true);
		page += run;
	}
	return 0;
}

void pager_forward_exits(struct pager *p)
{
	p->forwarded = true;
	p->waiters.answered = on_forwarded_answered;
	p->waiters.context = p;
}

static const struct region *region_at_offset(const struct pager *p, uint64_t offset)
{
	for (uint32_t i = 0; i < p->state->regions; i++)
		if (offset - p->region[i].image_offset < p->region[i].len_bytes)
			return &p->region[i];
	return NULL;
}

int64_t pager_external_fault(struct pager *p, uint64_t address, bool is_offset, uint32_t vcpu)
{
	const struct region *region = is_offset ? region_at_offset(p, address) : region_at_gpa(p, address);
	uint64_t page;

	if (!p->forwarded || !region)
		return EXTERNAL_OUTSIDE;
	address -= is_offset ? region->image_offset : region->gpa;
	page = region->first_page + (address >> region->page_shift);
	if (waiters_has_thread(&p->waiters, page, WAITER_EXIT | vcpu))
		return (int64_t)page;
	if (p->outstanding == ANSWERS_MAX || waiters_room(&p->waiters) == 0)
		return EXTERNAL_FULL;
	p->outstanding++;
	p->counters->exits++;
	pager_on_waiter(p, page, WAITER_EXIT | vcpu, pager_now_ns());
	return (int64_t)page;
}

uint32_t pager_take_answers(struct pager *p, struct pager_answer *out, uint32_t room)
{
	uint32_t count = p->answers < room ? p->answers : room;

	memcpy(out, p->answer, count * sizeof(*out));
	p->answers -= count;
	p->outstanding -= count;
	memmove(p->answer, p->answer + count, p->answers * sizeof(*out));
	return count;
}

void pager_want_gpa(struct pager *p, uint64_t gpa, uint64_t len_bytes)
{
	uint64_t end = gpa + len_bytes;

	while (gpa < end) {
		const struct region *region = region_at_gpa(p, gpa);
		uint64_t page, size;

		if (!region)
			return;
		size = 1ull << region->page_shift;
		page = region->first_page + ((gpa - region->gpa) >> region->page_shift);
		if (ledger_state(&p->ledger, page) == PAGE_MISSING)
			pager_want(p, page);
		gpa = (gpa & ~(size - 1)) + size;
	}
}
