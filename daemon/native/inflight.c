#include "inflight.h"

#include <stddef.h>
#include <string.h>

void inflight_init(struct inflight *inflight)
{
	memset(inflight, 0, sizeof(*inflight));
	for (uint32_t i = 0; i < INFLIGHT_SLOTS; i++)
		inflight->unused[inflight->unused_count++] = (uint16_t)(INFLIGHT_SLOTS - 1 - i);
}

struct request *inflight_add(struct inflight *inflight, enum lane lane, uint64_t first, uint64_t end, uint64_t now_ns)
{
	struct request *request;
	uint16_t slot;

	if (inflight->unused_count == 0)
		return NULL;
	slot = inflight->unused[--inflight->unused_count];
	request = &inflight->slot[slot];
	*request = (struct request){
		.id = ++inflight->generation[slot] * INFLIGHT_SLOTS + slot,
		.next_page = first,
		.end_page = end,
		.sent_ns = now_ns,
		.lane = lane,
	};
	inflight->requests[lane]++;
	inflight->pages[lane] += end - first;
	return request;
}

struct request *inflight_get(struct inflight *inflight, uint64_t id, bool *past)
{
	uint64_t slot = id % INFLIGHT_SLOTS, generation = id / INFLIGHT_SLOTS;

	*past = generation > 0 && generation <= inflight->generation[slot];
	if (id == 0 || inflight->slot[slot].id != id)
		return NULL;
	return &inflight->slot[slot];
}

void inflight_advance(struct inflight *inflight, struct request *request, uint64_t count)
{
	request->next_page += count;
	inflight->pages[request->lane] -= count;
	if (request->next_page == request->end_page)
		inflight_drop(inflight, request);
}

void inflight_drop(struct inflight *inflight, struct request *request)
{
	inflight->pages[request->lane] -= request->end_page - request->next_page;
	inflight->requests[request->lane]--;
	inflight->unused[inflight->unused_count++] = (uint16_t)(request->id % INFLIGHT_SLOTS);
	request->id = 0;
}
