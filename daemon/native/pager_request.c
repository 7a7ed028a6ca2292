/* What to ask the source for next: demand at once, the rest near recent faults first. */
#include "pager.h"

/* Pages around a fault that the push brings next: the aligned block of 64 (256 KiB of small pages). */
#define BLOCK_PAGES 64

/* Adjacent wanted pages are asked for in one range, up to so many. */
#define DEMAND_RUN_MAX 64

void pager_note_hot(struct pager *p, uint64_t page)
{
	uint64_t block = page / BLOCK_PAGES;

	if (p->hot_count && p->hot[(p->hot_next - 1) % HOT_SPOTS] == block)
		return;
	p->hot[p->hot_next++ % HOT_SPOTS] = block;
	if (p->hot_count < HOT_SPOTS)
		p->hot_count++;
}

static bool is_wanted(const struct pager *p, uint64_t page)
{
	enum page_state state = ledger_state(&p->ledger, page);

	return state == PAGE_MISSING || state == PAGE_REQUESTED;
}

size_t pager_encode_demand(struct pager *p, uint8_t *out, size_t capacity)
{
	uint64_t now_ns = pager_now_ns();
	size_t len = 0;

	while (p->wanted_head != p->wanted_tail && capacity - len >= WIRE_RANGE_MAX) {
		uint64_t first = p->wanted[p->wanted_head % WANTED_SLOTS], end = first + 1, most;
		const struct region *region = pager_region_of_page(p, first);
		struct request *request;

		if (!is_wanted(p, first)) { /* the push, or a removal, was faster */
			p->wanted_head++;
			continue;
		}
		most = p->max_range_bytes >> region->page_shift;
		if (most > DEMAND_RUN_MAX)
			most = DEMAND_RUN_MAX;
		/* What finds no room is sent when an answer makes some: pager_feed. */
		if (p->inflight.requests[LANE_DEMAND] >= p->max_ranges)
			break;
		request = inflight_add(&p->inflight, LANE_DEMAND, first, end, now_ns);
		if (!request)
			break;
		p->wanted_head++;
		while (p->wanted_head != p->wanted_tail && p->wanted[p->wanted_head % WANTED_SLOTS] == end &&
		       end < region_end_page(region) && end - first < most && is_wanted(p, end)) {
			p->wanted_head++;
			end++;
		}
		p->inflight.pages[LANE_DEMAND] += end - request->end_page;
		request->end_page = end;
		len += wire_put_range(out + len, request->id, region_offset_of_page(region, first),
				      (end - first) << region->page_shift, 1);
	}
	return len;
}

/* The next MISSING pages for the push in [first, end), of one region; *count of them from the returned page, 0 if none. */
static uint64_t missing_run(struct pager *p, uint64_t first, uint64_t end, uint64_t run_bytes, uint64_t *count)
{
	uint64_t page = ledger_find(&p->ledger, PAGE_MISSING, first, end), most;
	const struct region *region;

	*count = 0;
	if (page == end)
		return end;
	region = pager_region_of_page(p, page);
	if (end > region_end_page(region))
		end = region_end_page(region);
	most = run_bytes >> region->page_shift;
	if (most == 0)
		most = 1;
	if (end - page > most)
		end = page + most;
	*count = ledger_run(&p->ledger, 1u << PAGE_MISSING, page, end);
	return page;
}

/* Newest hot block first; a block without MISSING pages is done with. Then the cursor, round and round. */
static uint64_t next_for_push(struct pager *p, uint64_t run_bytes, uint64_t *count)
{
	uint64_t page;

	while (p->hot_count) {
		uint64_t first = p->hot[(p->hot_next - 1) % HOT_SPOTS] * BLOCK_PAGES;
		uint64_t end = first + BLOCK_PAGES < p->ledger.pages ? first + BLOCK_PAGES : p->ledger.pages;

		page = missing_run(p, first, end, run_bytes, count);
		if (*count)
			return page;
		p->hot_next--;
		p->hot_count--;
	}
	page = missing_run(p, p->bulk_cursor, p->ledger.pages, run_bytes, count);
	if (*count == 0 && p->bulk_cursor)
		page = missing_run(p, 0, p->bulk_cursor, run_bytes, count);
	p->bulk_cursor = *count ? page + *count : 0;
	return page;
}

size_t pager_encode_bulk(struct pager *p, uint64_t want_bytes, uint64_t run_bytes, uint8_t *out, size_t capacity,
			 uint64_t *claimed_bytes)
{
	uint64_t now_ns = pager_now_ns();
	size_t len = 0;

	*claimed_bytes = 0;
	if (p->inherited) /* what the dead process had read may say that pages are removed */
		return 0;
	if (run_bytes > p->max_range_bytes)
		run_bytes = p->max_range_bytes;
	while (*claimed_bytes < want_bytes && capacity - len >= WIRE_RANGE_MAX && p->ledger.count[PAGE_MISSING]) {
		uint64_t count, page, bytes;
		const struct region *region;
		struct request *request;

		/* Demand must always find a slot. */
		if (p->inflight.requests[LANE_BULK] >= INFLIGHT_SLOTS / 2 ||
		    p->inflight.requests[LANE_BULK] >= p->max_ranges)
			break;
		page = next_for_push(p, run_bytes, &count);
		if (count == 0)
			break;
		region = pager_region_of_page(p, page);
		request = inflight_add(&p->inflight, LANE_BULK, page, page + count, now_ns);
		if (!request)
			break;
		bytes = count << region->page_shift;
		ledger_apply_range(&p->ledger, PAGE_CLAIMED, page, count);
		p->bulk_inflight_bytes += bytes;
		*claimed_bytes += bytes;
		len += wire_put_range(out + len, request->id, region_offset_of_page(region, page), bytes, 3);
	}
	return len;
}

void pager_reset_lane(struct pager *p, enum lane lane)
{
	p->bad_streak = 0; /* the next stream begins without the blame of this one */
	for (uint32_t i = 0; i < INFLIGHT_SLOTS; i++) {
		struct request *r = &p->inflight.slot[i];

		if (r->id == 0 || r->lane != lane)
			continue;
		ledger_apply_range(&p->ledger, PAGE_LOST, r->next_page, r->end_page - r->next_page);
		inflight_drop(&p->inflight, r);
	}
	if (lane == LANE_BULK) {
		p->bulk_inflight_bytes = 0;
		p->bulk_cursor = 0;
		return;
	}
	while (p->wanted_head != p->wanted_tail)
		ledger_apply(&p->ledger, PAGE_LOST, p->wanted[p->wanted_head++ % WANTED_SLOTS]);
}
