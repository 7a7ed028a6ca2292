/* The ranges that were asked for and are not answered yet: what a reply is checked against. Fixed size.
 *
 * An id is made of its slot and a generation, so an id of the past is told from one that never was.
 */
#ifndef POSTCOPY_INFLIGHT_H
#define POSTCOPY_INFLIGHT_H

#include <stdbool.h>
#include <stdint.h>

#define INFLIGHT_SLOTS 1024u

enum lane {
	LANE_DEMAND = 0,
	LANE_BULK = 1,
	LANES = 2,
};

struct request {
	uint64_t id; /* 0: free */
	uint64_t next_page;
	uint64_t end_page;
	uint64_t sent_ns;
	enum lane lane;
};

struct inflight {
	struct request slot[INFLIGHT_SLOTS];
	uint64_t generation[INFLIGHT_SLOTS];
	uint16_t unused[INFLIGHT_SLOTS];
	uint32_t unused_count;
	uint32_t requests[LANES];
	uint64_t pages[LANES];
};

void inflight_init(struct inflight *inflight);

/* Note a request for [first, end). NULL if all slots are taken. */
struct request *inflight_add(struct inflight *inflight, enum lane lane, uint64_t first, uint64_t end, uint64_t now_ns);

/* The request of this id, or NULL. *past is set if the id was given out before and is done with. */
struct request *inflight_get(struct inflight *inflight, uint64_t id, bool *past);

/* `count` pages of it are answered; frees the slot when it was the rest. */
void inflight_advance(struct inflight *inflight, struct request *request, uint64_t count);

/* Give up a request; its slot is free. */
void inflight_drop(struct inflight *inflight, struct request *request);

#endif
