// sources: ledger.c
#include <string.h>

#include "check.h"
#include "ledger.h"

#define PAGES 131u /* four words and a few pages */

static void counts_match_states(const struct ledger *ledger)
{
	uint64_t count[PAGE_STATES] = { 0 }, sum = 0;

	for (uint64_t page = 0; page < ledger->pages; page++)
		count[ledger_state(ledger, page)]++;
	for (int s = 0; s < PAGE_STATES; s++) {
		CHECK_EQ(ledger->count[s], count[s]);
		sum += count[s];
	}
	CHECK_EQ(sum, ledger->pages);
}

static void every_pair_moves_as_the_table_says(void)
{
	uint64_t words[5] = { 0 };
	struct ledger ledger;
	/* How to bring a MISSING page into each state. */
	static const int way[PAGE_STATES] = { PAGE_LOST, PAGE_CLAIMED, PAGE_ARRIVED, PAGE_REMOVED };

	for (int event = 0; event < PAGE_EVENTS; event++) {
		for (int state = 0; state < PAGE_STATES; state++) {
			struct page_transition to = ledger_transition(event, state);

			memset(words, 0, sizeof(words));
			ledger_init(&ledger, words, PAGES);
			ledger_apply(&ledger, way[state], 33);
			CHECK_EQ(ledger_state(&ledger, 33), state);
			CHECK_EQ(ledger_apply(&ledger, event, 33), to.command);
			CHECK_EQ(ledger_state(&ledger, 33), to.next);
			CHECK_EQ(ledger_state(&ledger, 32), PAGE_MISSING);
			CHECK_EQ(ledger_state(&ledger, 34), PAGE_MISSING);
			counts_match_states(&ledger);
		}
	}
}

static void a_removed_page_takes_no_content_and_a_present_one_no_second(void)
{
	CHECK_EQ(ledger_transition(PAGE_ARRIVED, PAGE_ZERO).command, PAGE_DISCARD);
	CHECK_EQ(ledger_transition(PAGE_ARRIVED, PAGE_ZERO).next, PAGE_ZERO);
	CHECK_EQ(ledger_transition(PAGE_ARRIVED, PAGE_PRESENT).command, PAGE_DISCARD);
	for (int event = 0; event < PAGE_EVENTS; event++) {
		CHECK_EQ(ledger_transition(event, PAGE_ZERO).next, PAGE_ZERO);
		CHECK(ledger_transition(event, PAGE_ZERO).command != PAGE_FETCH);
		CHECK(ledger_transition(event, PAGE_PRESENT).command != PAGE_FETCH);
	}
}

static void a_range_does_what_its_pages_would(void)
{
	uint64_t one[5], many[5], seed = 42;
	struct ledger by_page, by_range;

	memset(one, 0, sizeof(one));
	memset(many, 0, sizeof(many));
	ledger_init(&by_page, one, PAGES);
	ledger_init(&by_range, many, PAGES);
	for (int round = 0; round < 3000; round++) {
		uint64_t first = next_random(&seed) % PAGES, count = next_random(&seed) % (PAGES - first + 1), changed = 0;
		enum page_event event = next_random(&seed) % PAGE_EVENTS;

		/* REMOVED and LOST often enough would leave nothing else to see. */
		if (event == PAGE_REMOVED && round % 50) {
			memset(one, 0, sizeof(one));
			memset(many, 0, sizeof(many));
			ledger_init(&by_page, one, PAGES);
			ledger_init(&by_range, many, PAGES);
		}
		for (uint64_t page = first; page < first + count; page++) {
			enum page_state before = ledger_state(&by_page, page);

			ledger_apply(&by_page, event, page);
			changed += before != ledger_state(&by_page, page);
		}
		CHECK_EQ(ledger_apply_range(&by_range, event, first, count), changed);
		CHECK(memcmp(one, many, sizeof(one)) == 0);
		counts_match_states(&by_range);
	}
}

static void find_and_run_see_what_a_walk_sees(void)
{
	uint64_t words[5] = { 0 }, seed = 7;
	struct ledger ledger;

	/* The places behind the last page hold rubbish, which must not count. */
	words[4] = ~0ull;
	for (int i = 0; i < 4; i++)
		words[i] = next_random(&seed) & next_random(&seed);
	ledger_init(&ledger, words, PAGES);
	counts_match_states(&ledger);
	for (uint64_t first = 0; first <= PAGES; first++) {
		for (uint64_t end = first; end <= PAGES; end += 7) {
			for (int state = 0; state < PAGE_STATES; state++) {
				uint64_t page = first;

				while (page < end && ledger_state(&ledger, page) != (enum page_state)state)
					page++;
				CHECK_EQ(ledger_find(&ledger, state, first, end), page);
			}
			for (unsigned mask = 0; mask < 16; mask++) {
				uint64_t page = first;

				while (page < end && mask >> ledger_state(&ledger, page) & 1)
					page++;
				CHECK_EQ(ledger_run(&ledger, mask, first, end), page - first);
			}
		}
	}
}

int main(void)
{
	CHECK_EQ(ledger_bytes(0), 0);
	CHECK_EQ(ledger_bytes(1), 8);
	CHECK_EQ(ledger_bytes(32), 8);
	CHECK_EQ(ledger_bytes(33), 16);
	every_pair_moves_as_the_table_says();
	a_removed_page_takes_no_content_and_a_present_one_no_second();
	a_range_does_what_its_pages_would();
	find_and_run_see_what_a_walk_sees();
	return 0;
}
