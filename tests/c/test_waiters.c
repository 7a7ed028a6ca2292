// sources: waiters.c histogram.c
#include <string.h>

#include "check.h"
#include "waiters.h"

#define PAGES 600u
#define TIDS 5u

static struct waiters w;

static uint32_t model_count(bool model[PAGES][TIDS], uint64_t page)
{
	uint32_t n = 0;

	for (uint32_t t = 0; t < TIDS; t++)
		n += model[page][t];
	return n;
}

static void follows_a_model(void)
{
	static bool model[PAGES][TIDS];
	uint64_t seed = 17, now = 1000;
	uint32_t total = 0;
	bool first;

	CHECK(waiters_init(&w));
	for (int round = 0; round < 60000; round++) {
		uint64_t page = next_random(&seed) % PAGES, action = next_random(&seed) % 100;
		uint32_t tid = (uint32_t)(next_random(&seed) % TIDS);

		now += next_random(&seed) % 50;
		if (action < 60) {
			uint32_t before = model_count(model, page);

			CHECK(waiters_add(&w, page, tid, now, &first));
			CHECK_EQ(first, before == 0);
			total += !model[page][tid];
			model[page][tid] = true;
		} else {
			uint64_t count = action < 98 ? next_random(&seed) % 4 : 2000, expected = 0;

			for (uint64_t p = page; p < page + count && p < PAGES; p++) {
				expected += model_count(model, p);
				memset(model[p], 0, sizeof(model[p]));
			}
			CHECK_EQ(waiters_resolve(&w, page, count, now), expected);
			total -= (uint32_t)expected;
		}
		CHECK_EQ(w.count, total);
		CHECK_EQ(waiters_has(&w, page), model_count(model, page) > 0);
	}
	CHECK_EQ(waiters_resolve(&w, 0, UINT64_MAX, now), total);
	CHECK_EQ(waiters_oldest_ns(&w), 0);
	for (uint64_t p = 0; p < PAGES; p++)
		CHECK(!waiters_has(&w, p));
	waiters_deinit(&w);
}

static void a_walk_that_resolves_passes_nobody_over(void)
{
	const struct waiter *entry;
	uint32_t at = 0, seen = 0;
	bool first;

	CHECK(waiters_init(&w));
	for (uint64_t page = 0; page < 3000; page++)
		CHECK(waiters_add(&w, page * 7, 1 + page % 3, 1, &first));
	while ((entry = waiters_next(&w, &at))) {
		uint32_t before = w.count;

		/* Some stay: their entries are what others are moved over. */
		if (entry->page % 5)
			waiters_resolve(&w, entry->page, 1, 2);
		if (w.count < before) {
			seen += before - w.count;
			at--;
		}
	}
	CHECK_EQ(seen, 2400);
	CHECK_EQ(w.count, 600);
	waiters_deinit(&w);
}

static void the_table_is_bounded(void)
{
	bool first;

	CHECK(waiters_init(&w));
	for (uint64_t page = 0; page < WAITERS_MAX; page++)
		CHECK(waiters_add(&w, page << 20, 0, page + 1, &first));
	CHECK_EQ(waiters_room(&w), 0);
	CHECK(!waiters_add(&w, 5, 0, 1, &first));
	CHECK(waiters_add(&w, 0, 0, 1, &first) && !first);
	CHECK_EQ(waiters_oldest_ns(&w), 1);
	CHECK_EQ(waiters_resolve(&w, 0, 1, 100), 1);
	CHECK_EQ(waiters_oldest_ns(&w), 2);
	waiters_deinit(&w);
}

static void block_time_is_by_thread(void)
{
	bool first;

	CHECK(waiters_init(&w));
	CHECK(waiters_add(&w, 1, 100, 1000, &first));
	CHECK(waiters_add(&w, 1, 200, 1500, &first));
	/* Kicked and back: still waiting since the first time. */
	CHECK(waiters_add(&w, 1, 100, 3000, &first));
	CHECK_EQ(waiters_resolve(&w, 1, 1, 4000), 2);
	CHECK_EQ(w.threads, 3);
	for (uint32_t i = 1; i < 3; i++) {
		CHECK_EQ(w.thread[i].faults, 1);
		CHECK_EQ(w.thread[i].blocked_ns, w.thread[i].tid == 100 ? 3000 : 2500);
	}
	/* More threads than the table has are counted together. */
	for (uint32_t tid = 1000; tid < 1000 + 2 * BLOCKED_THREADS_MAX; tid++) {
		CHECK(waiters_add(&w, tid, tid, 5000, &first));
		waiters_resolve(&w, tid, 1, 5001);
	}
	CHECK_EQ(w.threads, BLOCKED_THREADS_MAX);
	CHECK_EQ(w.thread[0].faults, 2 * BLOCKED_THREADS_MAX - (BLOCKED_THREADS_MAX - 3));
	CHECK_EQ(w.latency.count, 2 + 2 * BLOCKED_THREADS_MAX);
	waiters_deinit(&w);
}

int main(void)
{
	follows_a_model();
	a_walk_that_resolves_passes_nobody_over();
	the_table_is_bounded();
	block_time_is_by_thread();
	return 0;
}
