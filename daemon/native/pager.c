/* Life of a pager, and what the kernel's messages do to it. */
#include "pager.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Bounds one call, so that a storm of faults cannot hold the event loop. */
#define DRAIN_ROUNDS 8

uint64_t pager_now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t align(uint64_t value)
{
	return (value + 4095) & ~(uint64_t)4095;
}

/* Offsets of a fresh layout; the total in header.total_bytes. */
static struct state_header layout(uint64_t pages)
{
	struct state_header h = {
		.magic = STATE_MAGIC,
		.version = STATE_VERSION,
		.header_bytes = sizeof(struct state_header),
		.pages = pages,
		.descriptor_capacity = STATE_DESCRIPTOR_BYTES,
		.inbox_slots = STATE_INBOX_SLOTS,
	};

	h.descriptor_offset = align(sizeof(h));
	h.regions_offset = align(h.descriptor_offset + STATE_DESCRIPTOR_BYTES);
	h.inbox_offset = align(h.regions_offset + STATE_REGIONS_MAX * sizeof(struct region));
	h.extents_offset = align(h.inbox_offset + STATE_INBOX_SLOTS * sizeof(struct uffd_msg));
	h.words_offset = align(h.extents_offset + sizeof(struct extents));
	h.total_bytes = align(h.words_offset + ledger_bytes(pages));
	return h;
}

uint64_t pager_state_bytes(uint64_t pages)
{
	return layout(pages).total_bytes;
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
	inflight_init(&p->inflight);
	ledger_init(&p->ledger, (uint64_t *)(base + h->words_offset), h->pages);
	return p;
}

struct pager *pager_create(void *state, uint64_t len_bytes, const struct region *regions, uint32_t count, int uffd,
			   const struct uffd_edge *edge)
{
	struct state_header *h = state;
	uint64_t pages = 0;
	struct pager *p;

	if (count == 0 || count > STATE_REGIONS_MAX)
		return NULL;
	for (uint32_t i = 0; i < count; i++)
		pages += regions[i].len_bytes >> regions[i].page_shift;
	if (len_bytes < pager_state_bytes(pages))
		return NULL;
	*h = layout(pages);
	h->magic = 0; /* until the rest is there */
	h->regions = count;
	p = attach(state, uffd, edge);
	if (!p)
		return NULL;
	pages = 0;
	for (uint32_t i = 0; i < count; i++) {
		struct region *r = &p->region[i];

		*r = regions[i];
		r->first_page = pages;
		pages += r->len_bytes >> r->page_shift;
		if (!extents_add(p->extents, (struct extent){ r->hva, r->len_bytes, r->first_page, r->page_shift, 0 })) {
			pager_destroy(p);
			return NULL;
		}
	}
	__atomic_store_n(&h->magic, STATE_MAGIC, __ATOMIC_RELEASE);
	return p;
}

static bool layout_is_known(const struct state_header *h, uint64_t len_bytes)
{
	struct state_header ours;

	if (len_bytes < sizeof(*h) || h->magic != STATE_MAGIC || h->version != STATE_VERSION)
		return false;
	if (h->pages > len_bytes * 4)
		return false;
	ours = layout(h->pages);
	return h->header_bytes == ours.header_bytes && h->total_bytes == ours.total_bytes && len_bytes >= ours.total_bytes &&
	       h->descriptor_offset == ours.descriptor_offset && h->descriptor_len <= STATE_DESCRIPTOR_BYTES &&
	       h->regions_offset == ours.regions_offset && h->regions <= STATE_REGIONS_MAX &&
	       h->inbox_offset == ours.inbox_offset && h->inbox_slots == ours.inbox_slots &&
	       h->extents_offset == ours.extents_offset && h->words_offset == ours.words_offset;
}

static bool maps_are_sound(const struct pager *p)
{
	const struct extent *end = extents_end(p->extents), *before = NULL;

	if (p->extents->table[p->extents->current & 1].count > EXTENTS_MAX)
		return false;
	for (const struct extent *e = p->extents->table[p->extents->current & 1].entry; e < end; before = e++) {
		if (e->page_shift < 12 || e->page_shift > 30 || extent_end_page(e) > p->state->pages)
			return false;
		if (before && before->hva + before->len_bytes > e->hva)
			return false;
	}
	for (uint32_t i = 0; i < p->state->regions; i++)
		if (p->region[i].page_shift < 12 || p->region[i].page_shift > 30 ||
		    region_end_page(&p->region[i]) > p->state->pages)
			return false;
	return true;
}

struct pager *pager_adopt(void *state, uint64_t len_bytes, int uffd, const struct uffd_edge *edge)
{
	struct pager *p;

	if (!layout_is_known(state, len_bytes))
		return NULL;
	p = attach(state, uffd, edge);
	if (!p)
		return NULL;
	if (!maps_are_sound(p)) {
		pager_destroy(p);
		return NULL;
	}
	ledger_apply_range(&p->ledger, PAGE_LOST, 0, p->ledger.pages);
	for (const struct extent *e = extents_from(p->extents, 0); e && e < extents_end(p->extents); e++)
		p->edge->wake(uffd, e->hva, e->len_bytes);
	p->map_changed = true; /* it may have, before our time */
	p->inherited = true;
	return p;
}

void pager_destroy(struct pager *p)
{
	if (!p)
		return;
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
	case UFFD_PROCESS_GONE:
		p->signals |= PAGER_GONE;
		break;
	default:
		p->signals |= PAGER_STALLED;
	}
}

static void on_fault(struct pager *p, const struct uffd_msg *m, uint64_t now_ns)
{
	uint64_t hva = m->arg.pagefault.address, flags = m->arg.pagefault.flags, page;
	const struct extent *e = extents_at(p->extents, hva);
	bool first;

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
		/* Nobody here protects pages; a VMM that does and handed the descriptor over wants the write to go on. */
		p->edge->unprotect(p->uffd, extent_hva(e, page), 1ull << e->page_shift);
		return;
	}
	if (!waiters_add(&p->waiters, page, m->arg.pagefault.feat.ptid, now_ns, &first)) {
		/* No memory to note it; the room was checked before reading. Waking makes it ask again later. */
		p->edge->wake(p->uffd, extent_hva(e, page), 1ull << e->page_shift);
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
		if (flags & UFFD_PAGEFAULT_FLAG_MINOR)
			on_minor(p, e, page, now_ns);
		else
			pager_zero_fill(p, page);
	}
}

/* Pages of [start, end) that are mapped become ZERO. */
static void forget(struct pager *p, uint64_t start, uint64_t end, bool unmapped)
{
	uint64_t now_ns = pager_now_ns();

	for (const struct extent *e = extents_from(p->extents, start); e && e < extents_end(p->extents); e++) {
		uint64_t from = e->hva > start ? e->hva : start;
		uint64_t to = e->hva + e->len_bytes < end ? e->hva + e->len_bytes : end;
		uint64_t first, count;

		if (from >= to)
			break;
		first = extent_page(e, from);
		count = (to - from) >> e->page_shift;
		p->counters->removed += count;
		ledger_apply_range(&p->ledger, PAGE_REMOVED, first, count);
		if (unmapped)
			waiters_resolve(&p->waiters, first, count, now_ns);
		else
			pager_settle_zero(p, first, count);
	}
}

static void on_unmap(struct pager *p, uint64_t start, uint64_t end)
{
	p->map_changed = true;
	forget(p, start, end, true);
	if (!extents_unmap(p->extents, start, end - start))
		p->failure = (struct pager_failure){ UFFD_OPS, ENOSPC, start, end - start };
	p->edge->wake(p->uffd, start, end - start);
}

static void on_remap(struct pager *p, uint64_t from, uint64_t to, uint64_t len_bytes)
{
	p->map_changed = true;
	if (!extents_remap(p->extents, from, to, len_bytes))
		p->failure = (struct pager_failure){ UFFD_OPS, ENOSPC, from, len_bytes };
	p->edge->wake(p->uffd, from, len_bytes);
}

static void on_message(struct pager *p, const struct uffd_msg *m, uint64_t now_ns)
{
	p->counters->messages++;
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
	default:
		/* FORK brings a descriptor that the kernel put into this process; a VMM that forks with its memory
		 * registered asked for the event and must handle the child itself. */
		break;
	}
	if (p->failure.error)
		p->signals |= PAGER_FAILED;
}

/* Act on the whole inbox; a slot is emptied after it was acted upon. */
static void work_inbox(struct pager *p)
{
	uint64_t now_ns = pager_now_ns();

	for (uint32_t i = 0; i < STATE_INBOX_SLOTS && p->inbox[i].event; i++) {
		on_message(p, &p->inbox[i], now_ns);
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
	if (p->draining)
		return 0;
	p->draining = true;
	if (p->inherited) {
		work_old_inbox(p);
		p->inherited = false;
	}
	for (int round = 0; round < DRAIN_ROUNDS; round++) {
		uint32_t room = waiters_room(&p->waiters);
		ssize_t n;

		if (room > STATE_INBOX_SLOTS)
			room = STATE_INBOX_SLOTS;
		if (room == 0) {
			p->signals |= PAGER_STALLED;
			break;
		}
		n = p->edge->read(p->uffd, p->inbox, room * sizeof(p->inbox[0]));
		if (n > 0) {
			work_inbox(p);
			if (round == DRAIN_ROUNDS - 1)
				p->signals |= PAGER_MORE;
			continue;
		}
		if (n != -EAGAIN && n != -EINTR) {
			p->failure = (struct pager_failure){ UFFD_OPS, (int32_t)(n ? -n : EPIPE), 0, 0 };
			p->signals |= PAGER_FAILED;
		}
		break;
	}
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

	while ((w = waiters_next(&p->waiters, &at))) {
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
	}
	return pager_take_signals(p);
}

bool pager_is_complete(const struct pager *p)
{
	return p->ledger.count[PAGE_MISSING] == 0 && p->ledger.count[PAGE_REQUESTED] == 0 && p->waiters.count == 0;
}

int pager_release(struct pager *p)
{
	int last = 0;

	for (const struct extent *e = extents_from(p->extents, 0); e && e < extents_end(p->extents); e++) {
		int error = p->edge->unregister(p->uffd, e->hva, e->len_bytes);

		if (error)
			last = error;
	}
	return last;
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
