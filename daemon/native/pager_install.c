/* Replies of the source: checked against what was asked, installed, their waiters woken. */
#include "checksum.h"
#include "crash.h"
#include "pager.h"

#include <errno.h>
#include <sched.h>
#include <sys/mman.h>

/* While a mapping changes every install answers EAGAIN until the thread that changes it has run: let it, for a while, then
 * leave it to pager_retry. */
#define AGAIN_TRIES 64

/* So many bad replies in a row are no accident. */
#define BAD_STREAK_MAX 64

/* Zero bytes to copy from where the kernel has no ZEROPAGE (hugetlbfs): never written, so it costs no memory. */
static const void *zeros(uint64_t len_bytes)
{
	static void *zero;
	static uint64_t zero_len;

	if (len_bytes > zero_len) {
		void *fresh = mmap(NULL, len_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

		if (fresh == MAP_FAILED)
			return NULL;
		if (zero)
			munmap(zero, zero_len);
		zero = fresh;
		zero_len = len_bytes;
	}
	return zero;
}

void pager_fail(struct pager *p, enum uffd_op op, int error, uint64_t hva, uint64_t len_bytes)
{
	p->failure = (struct pager_failure){ op, error, hva, len_bytes };
	p->signals |= PAGER_FAILED;
}

/* hugetlbfs answers EEXIST not only where a page is, but also where the pool has none to give, once there is a place for
 * it in the page table (hugetlb_mfill_atomic_pte in mm/hugetlb.c: "actual_pte"; measured on 6.18). Believed, an absent
 * page would count as present and its content be lost. So it is believed only if huge pages were to be had right before
 * and right after, again and again; until then, memory is short. */
#define THERE_TRIES 3

static struct uffd_result copy(struct pager *p, uint64_t hva, const void *from, uint64_t len_bytes, unsigned page_shift)
{
	const struct uffd_edge *edge = p->edge;
	struct uffd_result r = edge->install(p->uffd, UFFD_OP_COPY, hva, (uintptr_t)from, len_bytes);

	if (r.answer != UFFD_THERE || page_shift == 12 || !edge->has_huge_page)
		return r;
	for (int i = 0; i < THERE_TRIES && r.answer == UFFD_THERE; i++) {
		if (!edge->has_huge_page(1ull << page_shift))
			return (struct uffd_result){ .answer = UFFD_NO_MEMORY, .error = EEXIST };
		r = edge->install(p->uffd, UFFD_OP_COPY, hva, (uintptr_t)from, len_bytes);
	}
	if (r.answer == UFFD_THERE && !edge->has_huge_page(1ull << page_shift))
		return (struct uffd_result){ .answer = UFFD_NO_MEMORY, .error = EEXIST };
	return r;
}

static struct uffd_result install_zero(struct pager *p, uint64_t hva, uint64_t len_bytes, unsigned page_shift)
{
	const void *from;

	if (len_bytes == 4096)
		return p->edge->install(p->uffd, UFFD_OP_ZEROPAGE, hva, 0, len_bytes);
	from = zeros(len_bytes);
	if (!from)
		return (struct uffd_result){ .answer = UFFD_NO_MEMORY, .error = ENOMEM };
	return copy(p, hva, from, len_bytes, page_shift);
}

/* Somebody waits for a page that is zero by right, or that is there already. */
void pager_zero_fill(struct pager *p, uint64_t page)
{
	const struct extent *e = extents_of_page(p->extents, page);
	uint64_t hva, len;
	struct uffd_result r;

	if (!e)
		return;
	hva = extent_hva(e, page);
	len = 1ull << e->page_shift;
	r = install_zero(p, hva, len, e->page_shift);
	switch (r.answer) {
	case UFFD_DONE:
		CRASH_POINT("zero.filled");
		p->counters->zero_filled++;
		break;
	case UFFD_THERE:
	case UFFD_UNMAPPED: /* its thread finds out by itself */
		p->edge->wake(p->uffd, hva, len);
		break;
	case UFFD_AGAIN:
	case UFFD_PART:
		p->signals |= PAGER_STALLED;
		return;
	case UFFD_NO_MEMORY:
		p->signals |= PAGER_STALLED | PAGER_SHORT;
		/* If it is there after all, its thread finds out; if not, it asks again, at the pace of retries. */
		if (r.error != EEXIST || !p->retrying)
			return;
		p->edge->wake(p->uffd, hva, len);
		break;
	case UFFD_PROCESS_GONE:
		p->signals |= PAGER_GONE;
		return;
	default:
		pager_fail(p, UFFD_OP_ZEROPAGE, r.error, hva, len);
		return;
	}
	pager_mark_resident(p, page, 1, true);
	waiters_resolve(&p->waiters, page, 1, pager_now_ns());
}

/* Zero-fill those pages of the range that are ZERO and waited for. */
void pager_settle_zero(struct pager *p, uint64_t first, uint64_t count)
{
	const struct waiter *w;
	uint32_t at = 0;

	if (count <= 64) {
		for (uint64_t i = first; i < first + count && p->waiters.count; i++)
			if (waiters_has(&p->waiters, i) && ledger_state(&p->ledger, i) == PAGE_ZERO)
				pager_zero_fill(p, i);
		return;
	}
	while ((w = waiters_next(&p->waiters, &at))) {
		uint32_t before = p->waiters.count;

		if (w->page - first < count && ledger_state(&p->ledger, w->page) == PAGE_ZERO)
			pager_zero_fill(p, w->page);
		if (p->waiters.count < before)
			at--;
	}
}

static void arrived(struct pager *p, enum lane lane, uint64_t first, uint64_t count)
{
	CRASH_POINT("install.done");
	ledger_apply_range(&p->ledger, PAGE_ARRIVED, first, count);
	CRASH_POINT("install.marked");
	pager_mark_resident(p, first, count, true);
	p->counters->arrived[lane] += count;
	waiters_resolve(&p->waiters, first, count, pager_now_ns());
}

/* It is not mapped any more: nobody can want it. */
static void forget_page(struct pager *p, uint64_t page)
{
	ledger_apply(&p->ledger, PAGE_REMOVED, page);
	p->counters->removed++;
	waiters_resolve(&p->waiters, page, 1, pager_now_ns());
}

/* What cannot be installed now is asked for again later. */
static void lose(struct pager *p, uint64_t first, uint64_t count)
{
	ledger_apply_range(&p->ledger, PAGE_LOST, first, count);
	if (p->bulk_cursor > first)
		p->bulk_cursor = first;
	p->signals |= PAGER_STALLED;
}

struct placement {
	uint64_t pages; /* dealt with, from the front */
	bool halt;	/* nothing more of this reply can be placed now */
};

/* One COPY of `count` pages in one extent, and what its answer asks for. *limit shrinks where a mapping is split. */
static struct placement place(struct pager *p, enum lane lane, const struct extent *e, uint64_t page, uint64_t count,
			      const uint8_t *data, uint64_t *limit)
{
	uint64_t hva = extent_hva(e, page), len = count << e->page_shift;
	struct uffd_result r = copy(p, hva, data, len, e->page_shift);

	switch (r.answer) {
	case UFFD_DONE:
	case UFFD_PART:
		count = r.done_bytes >> e->page_shift;
		arrived(p, lane, page, count);
		return (struct placement){ .pages = count };
	case UFFD_THERE:
		CRASH_POINT("install.there");
		p->edge->wake(p->uffd, hva, 1ull << e->page_shift);
		arrived(p, lane, page, 1);
		return (struct placement){ .pages = 1 };
	case UFFD_AGAIN:
		return (struct placement){ 0 };
	case UFFD_UNMAPPED:
		/* A COPY must stay within one mapping, and the VMM may have split its own. */
		if (count > 1) {
			*limit = count / 2;
			return (struct placement){ 0 };
		}
		p->edge->wake(p->uffd, hva, 1ull << e->page_shift);
		forget_page(p, page);
		return (struct placement){ .pages = 1 };
	case UFFD_NO_MEMORY:
		p->signals |= PAGER_SHORT;
		return (struct placement){ .halt = true };
	case UFFD_PROCESS_GONE:
		p->signals |= PAGER_GONE;
		return (struct placement){ .halt = true };
	default:
		pager_fail(p, UFFD_OP_COPY, r.error, hva, len);
		return (struct placement){ .halt = true };
	}
}

/* Put [first, first + count) in place from `data`. What is not wanted any more is passed over; what cannot be placed now
 * is MISSING again. The ledger is looked at anew after every drain, as a removal may have come. */
void pager_install(struct pager *p, enum lane lane, uint64_t first, uint64_t count, const uint8_t *data)
{
	const unsigned wanted = 1u << PAGE_MISSING | 1u << PAGE_REQUESTED;
	uint64_t page = first, end = first + count, limit = UINT64_MAX;
	unsigned shift = pager_region_of_page(p, first)->page_shift, tries = 0;

	while (page < end) {
		uint64_t run = ledger_run(&p->ledger, wanted, page, end);
		const struct extent *e;
		struct placement placed;

		if (run == 0) {
			run = ledger_run(&p->ledger, ~wanted, page, end);
			p->counters->duplicates += run;
			page += run;
			continue;
		}
		e = extents_of_page(p->extents, page);
		if (!e) {
			forget_page(p, page++);
			continue;
		}
		if (run > extent_end_page(e) - page)
			run = extent_end_page(e) - page;
		if (run > limit)
			run = limit;
		placed = place(p, lane, e, page, run, data + ((page - first) << shift), &limit);
		if (placed.halt)
			break;
		page += placed.pages;
		if (placed.pages) {
			tries = 0;
		} else if (limit >= run) { /* AGAIN, not a split */
			if (++tries > AGAIN_TRIES)
				break;
			p->signals |= pager_drain(p);
			sched_yield();
		}
	}
	if (page < end)
		lose(p, page, end - page);
}

static void refuse(struct pager *p, uint64_t first, uint64_t end)
{
	p->counters->bad_replies++;
	p->bad_streak++;
	lose(p, first, end - first);
}

static void note_answered(struct pager *p, const struct request *request, uint64_t count, unsigned shift)
{
	if (request->lane == LANE_BULK)
		p->bulk_inflight_bytes -= count << shift;
}

static void drop_request(struct pager *p, struct request *request, unsigned shift)
{
	note_answered(p, request, request->end_page - request->next_page, shift);
	inflight_drop(&p->inflight, request);
}

static void accept_run(struct pager *p, struct request *request, const struct wire_run *run, unsigned shift)
{
	uint64_t first = request->next_page, count = run->len_bytes >> shift;
	enum lane lane = request->lane;

	/* The request moves on first: an install may drain, and a drain must not find the pages still outstanding. */
	note_answered(p, request, count, shift);
	inflight_advance(&p->inflight, request, count);
	if (!run->data) {
		ledger_apply_range(&p->ledger, PAGE_IS_ZERO, first, count);
		CRASH_POINT("zero.marked");
		pager_settle_zero(p, first, count);
	} else if (checksum_run(run->data, run->data_len, run->offset) != run->xxh3_64) {
		refuse(p, first, first + count);
		return;
	} else {
		p->counters->bytes_received[lane] += run->data_len;
		pager_install(p, lane, first, count, run->data);
	}
	p->bad_streak = 0;
}

static void on_run(struct pager *p, const struct wire_run *run)
{
	const struct region *region;
	struct request *request;
	uint64_t left_bytes;
	bool past;

	request = inflight_get(&p->inflight, run->request_id, &past);
	if (!request) {
		if (past) {
			p->counters->stale_replies++;
		} else {
			p->counters->bad_replies++;
			p->bad_streak++;
		}
		return;
	}
	region = pager_region_of_page(p, request->next_page);
	left_bytes = (request->end_page - request->next_page) << region->page_shift;
	if (run->offset != region_offset_of_page(region, request->next_page) || run->len_bytes == 0 ||
	    run->len_bytes & ((1ull << region->page_shift) - 1) || run->len_bytes > left_bytes ||
	    (run->data && run->data_len != run->len_bytes)) {
		uint64_t first = request->next_page, end = request->end_page;

		drop_request(p, request, region->page_shift);
		refuse(p, first, end);
		return;
	}
	accept_run(p, request, run, region->page_shift);
}

int pager_feed(void *context, const uint8_t *message, size_t len)
{
	struct pager *p = context;
	struct wire_reader reader = { message, message + len };
	struct wire_run run;

	for (;;) {
		switch (wire_next_run(&reader, &run)) {
		case WIRE_RUN:
			on_run(p, &run);
			if (p->bad_streak < BAD_STREAK_MAX)
				continue;
			break;
		case WIRE_END:
			/* Answers free slots that wanted pages may have found taken. */
			if (p->wanted_head != p->wanted_tail)
				p->signals |= PAGER_SEND;
			return (int)p->signals;
		case WIRE_BAD:
			p->counters->bad_replies++;
			break;
		}
		p->signals |= PAGER_DISTRUST;
		return -1;
	}
}

/* Pages of `region` that lie in [offset, offset + len) of the image as a whole: *count of them from the returned one. */
static uint64_t whole_pages(const struct region *r, uint64_t offset, uint64_t len_bytes, uint64_t *count)
{
	uint64_t region_end = r->image_offset + r->len_bytes, page_mask = (1ull << r->page_shift) - 1, to, first, end;
	uint64_t from = offset > r->image_offset ? offset : r->image_offset;

	*count = 0;
	if (__builtin_add_overflow(offset, len_bytes, &to) || to > region_end)
		to = region_end;
	if (from >= to)
		return 0;
	first = (from - r->image_offset + page_mask) >> r->page_shift;
	end = (to - r->image_offset) >> r->page_shift;
	if (first < end)
		*count = end - first;
	return r->first_page + first;
}

unsigned pager_mark_zero(struct pager *p, uint64_t offset, uint64_t len_bytes)
{
	for (uint32_t i = 0; i < p->state->regions; i++) {
		uint64_t count, first = whole_pages(&p->region[i], offset, len_bytes, &count);

		if (count == 0)
			continue;
		ledger_apply_range(&p->ledger, PAGE_IS_ZERO, first, count);
		pager_settle_zero(p, first, count);
	}
	return p->signals;
}

void pager_mark_present(struct pager *p, uint64_t offset, uint64_t len_bytes)
{
	for (uint32_t i = 0; i < p->state->regions; i++) {
		uint64_t count, first = whole_pages(&p->region[i], offset, len_bytes, &count);

		ledger_apply_range(&p->ledger, PAGE_ARRIVED, first, count);
	}
	if (p->waiters.count)
		p->signals |= PAGER_STALLED;
}

/* Poison [page, page + count), which lies in one extent; how many pages were. */
static uint64_t poison_run(struct pager *p, const struct extent *e, uint64_t page, uint64_t count)
{
	uint64_t done = 0, limit = count;
	unsigned tries = 0;

	while (done < count) {
		uint64_t run = count - done < limit ? count - done : limit;
		uint64_t hva = extent_hva(e, page + done);
		struct uffd_result r = p->edge->install(p->uffd, UFFD_OP_POISON, hva, 0, run << e->page_shift);

		if (r.answer == UFFD_DONE || r.answer == UFFD_PART) {
			done += r.done_bytes >> e->page_shift;
		} else if (r.answer == UFFD_THERE) {
			p->edge->wake(p->uffd, hva, 1ull << e->page_shift);
			done++;
		} else if (r.answer == UFFD_UNMAPPED && run > 1) {
			limit = run / 2;
		} else if (r.answer == UFFD_UNMAPPED) {
			done++;
		} else if (r.answer == UFFD_AGAIN && ++tries < AGAIN_TRIES) {
			p->signals |= pager_drain(p);
			sched_yield();
		} else {
			break;
		}
	}
	return done;
}

bool pager_poison_missing(struct pager *p)
{
	const unsigned absent = 1u << PAGE_MISSING | 1u << PAGE_REQUESTED;
	uint64_t page = 0;

	p->poisoned = true;
	if (p->ring)
		exit_ring_shut(p->ring);
	while (page < p->ledger.pages) {
		uint64_t run = ledger_run(&p->ledger, absent, page, p->ledger.pages), done;
		const struct extent *e;

		if (run == 0) {
			page += ledger_run(&p->ledger, ~absent, page, p->ledger.pages);
			continue;
		}
		e = extents_of_page(p->extents, page);
		if (!e) {
			forget_page(p, page++);
			continue;
		}
		if (run > extent_end_page(e) - page)
			run = extent_end_page(e) - page;
		done = poison_run(p, e, page, run);
		/* Nothing more is owed to them: whatever the source may say later, the guest has seen the error. */
		ledger_apply_range(&p->ledger, PAGE_ARRIVED, page, done);
		waiters_resolve(&p->waiters, page, done, pager_now_ns());
		if (done < run)
			return false;
		page += done;
	}
	return true;
}
