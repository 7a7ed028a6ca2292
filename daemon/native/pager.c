/* Life of a pager, and what the kernel's messages do to it. */
#include "crash.h"
#include "pager.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Bounds one call, so that a storm of faults cannot hold the event loop. */
#define DRAIN_ROUNDS 8

uint64_t pager_now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t pager_state_bytes(uint64_t pages)
{
	return state_layout(pages).total_bytes;
}

static struct pager *attach(void *state, int uffd, const struct uffd_edge *edge)
{
	struct pager *p = calloc(1, sizeof(*p));
	struct state_header *h = state;
	char *base = state;

	if (!p)
		return NULL;
	if (!waiters_init(&p->waiters)) {
		free(p);
		return NULL;
	}
	p->state = h;
	p->counters = &h->counters;
	p->region = (struct region *)(base + h->regions_offset);
	p->inbox = (struct uffd_msg *)(base + h->inbox_offset);
	p->extents = (struct extents *)(base + h->extents_offset);
	p->uffd = uffd;
	p->edge = edge ? edge : &uffd_kernel;
	p->max_range_bytes = 1 << 20;
	p->max_ranges = INFLIGHT_SLOTS;
	inflight_init(&p->inflight);
	ledger_init(&p->ledger, (uint64_t *)(base + h->words_offset), h->pages);
	return p;
}

struct pager *pager_create(void *state, uint64_t len_bytes, const struct region *regions, uint32_t count, int uffd,
			   const struct uffd_edge *edge)
{
	struct state_header *h = state, fresh;
	struct region *table;
	uint64_t pages;
	struct pager *p;

	if (count == 0 || count > STATE_REGIONS_MAX || len_bytes < pager_state_bytes(0))
		return NULL;
	/* Where the regions go does not depend on how many pages they have. */
	fresh = state_layout(0);
	table = (struct region *)((char *)state + fresh.regions_offset);
	memcpy(table, regions, count * sizeof(*regions));
	pages = state_number_pages(table, count);
	if (pages == 0 || pages > len_bytes * 4 || len_bytes < pager_state_bytes(pages))
		return NULL;
	fresh = state_layout(pages);
	fresh.magic = 0; /* until the rest is there */
	fresh.regions = count;
	*h = fresh;
	p = attach(state, uffd, edge);
	if (!p)
		return NULL;
	for (const struct region *r = table; r < table + count; r++) {
		if (!extents_add(p->extents, (struct extent){ r->hva, r->len_bytes, r->first_page, r->page_shift, 0 })) {
			pager_destroy(p);
			return NULL;
		}
	}
	__atomic_store_n(&h->magic, STATE_MAGIC, __ATOMIC_RELEASE);
	return p;
}

static void wake_everything(struct pager *p)
{
	for (const struct extent *e = extents_from(p->extents, 0); e && e < extents_end(p->extents); e++)
		p->edge->wake(p->uffd, e->hva, e->len_bytes);
}

struct pager *pager_adopt(void *state, uint64_t len_bytes, int uffd, const struct uffd_edge *edge)
{
	struct pager *p;

	if (!state_is_sound(state, len_bytes))
		return NULL;
	p = attach(state, uffd, edge);
	if (!p)
		return NULL;
	ledger_apply_range(&p->ledger, PAGE_LOST, 0, p->ledger.pages);
	CRASH_POINT("adopt.lost");
	wake_everything(p);
	p->map_changed = true; /* it may have, before our time */
	p->inherited = true;
	return p;
}

void pager_destroy(struct pager *p)
{
	if (!p)
		return;
	for (uint32_t i = 0; i < p->forks; i++)
		close(p->fork[i]);
	if (p->ring)
		exit_ring_detach(p->ring);
	waiters_deinit(&p->waiters);
	free(p);
}

const struct region *pager_region_of_page(const struct pager *p, uint64_t page)
{
	uint32_t low = 0, high = p->state->regions;

	while (high - low > 1) {
		uint32_t middle = low + (high - low) / 2;

		if (p->region[middle].first_page <= page)
			low = middle;
		else
			high = middle;
	}
	return &p->region[low];
}

/* The page is wanted at once. Without room it stays MISSING in the ledger, and pager_retry finds it by its waiter. */
void pager_want(struct pager *p, uint64_t page)
{
	if (p->wanted_tail - p->wanted_head == WANTED_SLOTS) {
		p->signals |= PAGER_STALLED;
		return;
	}
	ledger_apply(&p->ledger, PAGE_FAULTED, page);
	p->wanted[p->wanted_tail++ % WANTED_SLOTS] = page;
	p->signals |= PAGER_SEND;
}

static void on_minor(struct pager *p, const struct extent *e, uint64_t page, uint64_t now_ns)
{
	uint64_t hva = extent_hva(e, page), len = 1ull << e->page_shift;
	struct uffd_result r = p->edge->install(p->uffd, UFFD_OP_CONTINUE, hva, 0, len);

	switch (r.answer) {
	case UFFD_DONE:
		waiters_resolve(&p->waiters, page, 1, now_ns);
		break;
	case UFFD_THERE:
	case UFFD_UNMAPPED:
		p->edge->wake(p->uffd, hva, len);
		waiters_resolve(&p->waiters, page, 1, now_ns);
		break;
	case UFFD_NO_PAGE: /* removed since the message */
		pager_zero_fill(p, page);
		break;
	case UFFD_AGAIN:
	case UFFD_PART:
		p->signals |= PAGER_STALLED;
		break;
	case UFFD_NO_MEMORY:
		p->signals |= PAGER_STALLED | PAGER_SHORT;
		break;
	case UFFD_PROCESS_GONE:
		p->signals |= PAGER_GONE;
		break;
	default:
		pager_fail(p, UFFD_OP_CONTINUE, r.error, hva, len);
	}
}

static bool is_settled(const struct pager *p, uint64_t page)
{
	enum page_state state = ledger_state(&p->ledger, page);

	return state == PAGE_PRESENT || state == PAGE_ZERO;
}

/* A waiter was not noted, so it is owed without a name: pager_retry wakes everybody when there is room. Waking it now would
 * only bring the message back at once, ahead of the events that installs may be waiting for. */
static void overflow(struct pager *p)
{
	p->overflowed = true;
	p->signals |= PAGER_STALLED;
}

/* Somebody waits for `page`: note it, and do what the ledger says. */
void pager_on_waiter(struct pager *p, uint64_t page, uint32_t tid, uint64_t now_ns)
{
	bool first;

	if (!waiters_add(&p->waiters, page, tid, now_ns, &first)) {
		overflow(p);
		return;
	}
	switch (ledger_transition(PAGE_FAULTED, ledger_state(&p->ledger, page)).command) {
	case PAGE_FETCH:
	case PAGE_WAIT:
		/* The first waiter asks even when the push has asked: the push may be far from sending it. */
		if (first)
			pager_want(p, page);
		pager_note_hot(p, page);
		break;
	default:
		pager_zero_fill(p, page);
	}
}

static void on_fault(struct pager *p, const struct uffd_msg *m, uint64_t now_ns)
{
	uint64_t hva = m->arg.pagefault.address, flags = m->arg.pagefault.flags, page;
	const struct extent *e = extents_at(p->extents, hva);

	p->counters->faults++;
	if (!e) {
		/* Unmapped or moved while the message was under way: its thread looks again. Otherwise the VMM registered
		 * memory that it did not hand over: nobody knows its content, so its thread stays parked. */
		p->counters->faults_outside++;
		if (p->map_changed)
			p->edge->wake(p->uffd, hva & ~4095ull, 4096);
		return;
	}
	page = extent_page(e, hva);
	if (flags & UFFD_PAGEFAULT_FLAG_WP) {
		/* Nobody here protects pages; a VMM that does and handed the descriptor over wants the write to go on.
		 * Refused while the mapping changes: then its thread asks again. */
		if (p->edge->unprotect(p->uffd, extent_hva(e, page), 1ull << e->page_shift))
			p->edge->wake(p->uffd, extent_hva(e, page), 1ull << e->page_shift);
		return;
	}
	if (flags & UFFD_PAGEFAULT_FLAG_MINOR && is_settled(p, page)) {
		if (waiters_add(&p->waiters, page, m->arg.pagefault.feat.ptid, now_ns, &(bool){ false }))
			on_minor(p, e, page, now_ns);
		else
			overflow(p);
		return;
	}
	pager_on_waiter(p, page, m->arg.pagefault.feat.ptid, now_ns);
}

/* Pages that lie in [start, end) as a whole become ZERO. MADV_REMOVE of a part of a huge page announces just that part, but
 * the page stays: hugetlbfs punches whole pages only. */
static void forget(struct pager *p, uint64_t start, uint64_t end, bool unmapped)
{
	uint64_t now_ns = pager_now_ns();

	for (const struct extent *e = extents_from(p->extents, start); e && e < extents_end(p->extents); e++) {
		uint64_t from = e->hva > start ? e->hva : start;
		uint64_t to = e->hva + e->len_bytes < end ? e->hva + e->len_bytes : end;
		uint64_t first, count, in_page = (1ull << e->page_shift) - 1;

		if (from >= to)
			break;
		from = (from + in_page) & ~in_page;
		to &= ~in_page;
		if (from >= to)
			continue;
		first = extent_page(e, from);
		count = (to - from) >> e->page_shift;
		p->counters->removed += count;
		ledger_apply_range(&p->ledger, PAGE_REMOVED, first, count);
		pager_mark_resident(p, first, count, false);
		if (unmapped)
			waiters_resolve(&p->waiters, first, count, now_ns);
		else
			pager_settle_zero(p, first, count);
	}
}

/* Whether [start, end) cuts a page: the kernel does not do that to memory of the page size that the VMM named. */
static bool cuts_page(const struct pager *p, uint64_t start, uint64_t end)
{
	const struct extent *first = extents_at(p->extents, start), *last = extents_at(p->extents, end);

	return (first && (start - first->hva) & ((1ull << first->page_shift) - 1)) ||
	       (last && (end - last->hva) & ((1ull << last->page_shift) - 1));
}

static void on_unmap(struct pager *p, uint64_t start, uint64_t end)
{
	p->map_changed = true;
	if (cuts_page(p, start, end)) {
		pager_fail(p, UFFD_OPS, EINVAL, start, end - start);
		return;
	}
	forget(p, start, end, true);
	if (!extents_unmap(p->extents, start, end - start))
		pager_fail(p, UFFD_OPS, ENOSPC, start, end - start);
	p->edge->wake(p->uffd, start, end - start);
}

static void on_remap(struct pager *p, uint64_t from, uint64_t to, uint64_t len_bytes)
{
	p->map_changed = true;
	if (cuts_page(p, from, from + len_bytes) || cuts_page(p, to, to + len_bytes)) {
		pager_fail(p, UFFD_OPS, EINVAL, from, len_bytes);
		return;
	}
	if (!extents_remap(p->extents, from, to, len_bytes))
		pager_fail(p, UFFD_OPS, ENOSPC, from, len_bytes);
	p->edge->wake(p->uffd, from, len_bytes);
	/* A fault at the new place is delivered ahead of the event that explains it. */
	p->edge->wake(p->uffd, to, len_bytes);
}

/* The kernel has put the child's userfaultfd into this process. A child that never touches guest memory (most call execve
 * at once) needs nothing. One that does stands still as long as the descriptor is open; closing it would show it zeros, in
 * shared memory even the parent. So it is kept, and a VMM that forks on and on is not served: it would use up our
 * descriptors. Source: userfaultfd(2), UFFD_FEATURE_EVENT_FORK. */
static void on_fork(struct pager *p, int child)
{
	if (p->forks < FORKS_MAX) {
		p->fork[p->forks++] = child;
		return;
	}
	close(child);
	pager_fail(p, UFFD_OPS, EMFILE, 0, 0);
}

static void on_message(struct pager *p, const struct uffd_msg *m, uint64_t now_ns)
{
	p->counters->messages++;
	/* From here on what is absent need not be the image's. */
	if (p->ring && m->event != UFFD_EVENT_PAGEFAULT)
		exit_ring_shut(p->ring);
	switch (m->event) {
	case UFFD_EVENT_PAGEFAULT:
		on_fault(p, m, now_ns);
		break;
	case UFFD_EVENT_REMOVE:
		forget(p, m->arg.remove.start, m->arg.remove.end, false);
		break;
	case UFFD_EVENT_UNMAP:
		on_unmap(p, m->arg.remove.start, m->arg.remove.end);
		break;
	case UFFD_EVENT_REMAP:
		on_remap(p, m->arg.remap.from, m->arg.remap.to, m->arg.remap.len);
		break;
	case UFFD_EVENT_FORK:
		/* What another process read brought the descriptor to that process. */
		if (!p->inherited)
			on_fork(p, (int)m->arg.fork.ufd);
		break;
	default:
		/* No other event exists that was asked for; one that is not known can be passed over. */
		break;
	}
}

/* Act on the whole inbox; a slot is emptied after it was acted upon. */
static void work_inbox(struct pager *p)
{
	uint64_t now_ns = pager_now_ns();

	for (uint32_t i = 0; i < STATE_INBOX_SLOTS && p->inbox[i].event; i++) {
		on_message(p, &p->inbox[i], now_ns);
		CRASH_POINT("inbox.acted");
		p->inbox[i].event = 0;
	}
}

/* A process died over its inbox: slots before the first full one are empty. */
static void work_old_inbox(struct pager *p)
{
	uint64_t now_ns = pager_now_ns();

	for (uint32_t i = 0; i < STATE_INBOX_SLOTS; i++) {
		if (p->inbox[i].event)
			on_message(p, &p->inbox[i], now_ns);
		p->inbox[i].event = 0;
	}
}

unsigned pager_drain(struct pager *p)
{
	bool held = false;

	if (p->draining)
		return 0;
	p->draining = true;
	if (p->inherited) {
		work_old_inbox(p);
		p->inherited = false;
	}
	for (int round = 0; round < DRAIN_ROUNDS; round++) {
		ssize_t n;

		/* A thread that gives memory back goes on as soon as its event is read: then no vCPU may be in the middle of
		 * installing what lay there. */
		if (p->ring && !exit_ring_hold(p->ring)) {
			p->signals |= PAGER_HELD | PAGER_STALLED;
			held = true;
			break;
		}
		n = p->edge->read(p->uffd, p->inbox, STATE_INBOX_SLOTS * sizeof(p->inbox[0]));
		if (n > 0) {
			CRASH_POINT("inbox.read");
			work_inbox(p);
			if (round == DRAIN_ROUNDS - 1)
				p->signals |= PAGER_MORE;
			continue;
		}
		if (n != -EAGAIN && n != -EINTR) {
			pager_fail(p, UFFD_OPS, (int)(n ? -n : EPIPE), 0, 0);
		}
		break;
	}
	if (p->ring && !held)
		exit_ring_open(p->ring);
	if (p->ring)
		pager_drain_exits(p);
	p->draining = false;
	return pager_take_signals(p);
}

unsigned pager_take_signals(struct pager *p)
{
	unsigned signals = p->signals;

	p->signals = 0;
	return signals;
}

unsigned pager_retry(struct pager *p)
{
	uint64_t now_ns = pager_now_ns();
	const struct waiter *w;
	uint32_t at = 0;

	p->retrying = true;
	while ((w = waiters_next(&p->waiters, &at))) {
		uint32_t before = p->waiters.count;
		uint64_t page = w->page;

		switch (ledger_state(&p->ledger, page)) {
		case PAGE_MISSING:
			p->counters->retries++;
			pager_want(p, page);
			break;
		case PAGE_REQUESTED:
			break;
		default:
			if (extents_of_page(p->extents, page))
				pager_zero_fill(p, page);
			else
				waiters_resolve(&p->waiters, page, 1, now_ns);
		}
		if (p->waiters.count < before)
			at--;
	}
	p->retrying = false;
	if (p->overflowed) {
		/* Not before half is free, or the same faults would only come and go. */
		if (waiters_room(&p->waiters) >= WAITERS_MAX / 2) {
			p->overflowed = false;
			wake_everything(p);
		} else {
			p->signals |= PAGER_STALLED;
		}
	}
	return pager_take_signals(p);
}

bool pager_is_complete(const struct pager *p)
{
	return p->ledger.count[PAGE_MISSING] == 0 && p->ledger.count[PAGE_REQUESTED] == 0 && p->waiters.count == 0 &&
	       !p->inherited && !p->overflowed;
}

int pager_release(struct pager *p)
{
	int last = 0;

	for (const struct extent *e = extents_from(p->extents, 0); e && e < extents_end(p->extents); e++) {
		int error = p->edge->unregister(p->uffd, e->hva, e->len_bytes);

		if (error)
			last = error;
	}
	if (p->ring) {
		exit_ring_mark(p->ring, 0, p->ring->residency_pages, true);
		exit_ring_set_complete(p->ring);
	}
	return last;
}

bool pager_let_go(struct pager *p)
{
	const struct extent *e = extents_from(p->extents, 0);

	while (p->edge->read(p->uffd, p->inbox, STATE_INBOX_SLOTS * sizeof(p->inbox[0])) > 0) {
		/* Everything is in place and nothing is ours any more: that it was read is the whole answer. */
		for (uint32_t i = 0; i < STATE_INBOX_SLOTS && p->inbox[i].event; i++) {
			if (p->inbox[i].event == UFFD_EVENT_FORK)
				on_fork(p, (int)p->inbox[i].arg.fork.ufd);
			p->inbox[i].event = 0;
		}
	}
	return !p->edge->is_changing || !e || e >= extents_end(p->extents) ||
	       !p->edge->is_changing(p->uffd, e->hva, 1ull << e->page_shift);
}

void pager_get_stats(const struct pager *p, struct pager_stats *s)
{
	const struct histogram *h = &p->waiters.latency;
	uint64_t oldest = waiters_oldest_ns(&p->waiters);

	*s = (struct pager_stats){
		.pages = p->ledger.pages,
		.missing = p->ledger.count[PAGE_MISSING],
		.requested = p->ledger.count[PAGE_REQUESTED],
		.present = p->ledger.count[PAGE_PRESENT],
		.zero = p->ledger.count[PAGE_ZERO],
		.counters = *p->counters,
		.waiting = p->waiters.count,
		.oldest_wait_ns = oldest ? pager_now_ns() - oldest : 0,
		.latency_count = h->count,
		.latency_p50_ns = histogram_quantile_ns(h, 0.50),
		.latency_p90_ns = histogram_quantile_ns(h, 0.90),
		.latency_p99_ns = histogram_quantile_ns(h, 0.99),
		.latency_max_ns = h->max_ns,
		.latency_sum_ns = h->sum_ns,
		.bulk_inflight_bytes = p->bulk_inflight_bytes,
		.demand_inflight = p->inflight.requests[LANE_DEMAND],
		.threads = p->waiters.threads,
	};
	histogram_log2_us(h, s->latency_log2_us, 32);
}
