// sources: inflight.c
#include "check.h"
#include "inflight.h"

static struct inflight f;

static void an_id_is_known_once_and_past_afterwards(void)
{
	struct request *r;
	uint64_t id;
	bool past;

	inflight_init(&f);
	CHECK(!inflight_get(&f, 0, &past) && !past);
	CHECK(!inflight_get(&f, 1024, &past) && !past);
	CHECK(!inflight_get(&f, UINT64_MAX, &past) && !past);
	r = inflight_add(&f, LANE_DEMAND, 10, 14, 5);
	CHECK(r && r->id != 0);
	id = r->id;
	CHECK(inflight_get(&f, id, &past) == r);
	inflight_advance(&f, r, 3);
	CHECK(inflight_get(&f, id, &past) == r);
	CHECK_EQ(r->next_page, 13);
	CHECK_EQ(f.pages[LANE_DEMAND], 1);
	inflight_advance(&f, r, 1);
	CHECK(!inflight_get(&f, id, &past) && past);
	CHECK_EQ(f.requests[LANE_DEMAND], 0);
	/* The slot is used again, under another id. */
	r = inflight_add(&f, LANE_BULK, 0, 1, 5);
	CHECK(r && r->id != id);
	CHECK(!inflight_get(&f, id, &past) && past);
}

static void slots_are_bounded_and_come_back(void)
{
	uint64_t seed = 3, live[INFLIGHT_SLOTS], pages[LANES] = { 0 };
	uint32_t count = 0, requests[LANES] = { 0 };
	bool past;

	inflight_init(&f);
	for (int round = 0; round < 100000; round++) {
		if (next_random(&seed) % 100 < 52) {
			enum lane lane = next_random(&seed) % LANES;
			uint64_t len = 1 + next_random(&seed) % 64;
			struct request *r = inflight_add(&f, lane, round, round + len, 1);

			CHECK(!r == (count == INFLIGHT_SLOTS));
			if (!r)
				continue;
			live[count++] = r->id;
			pages[lane] += len;
			requests[lane]++;
		} else if (count) {
			uint32_t which = (uint32_t)(next_random(&seed) % count);
			struct request *r = inflight_get(&f, live[which], &past);
			enum lane lane;
			uint64_t part;

			CHECK(r);
			lane = r->lane;
			part = r->end_page - r->next_page;
			if (part > 1 && next_random(&seed) % 2) {
				inflight_advance(&f, r, part / 2);
				pages[lane] -= part / 2;
			} else {
				inflight_drop(&f, r);
				pages[lane] -= part;
				requests[lane]--;
				live[which] = live[--count];
			}
		}
		for (int lane = 0; lane < LANES; lane++) {
			CHECK_EQ(f.pages[lane], pages[lane]);
			CHECK_EQ(f.requests[lane], requests[lane]);
		}
	}
}

int main(void)
{
	an_id_is_known_once_and_past_afterwards();
	slots_are_bounded_and_come_back();
	return 0;
}
