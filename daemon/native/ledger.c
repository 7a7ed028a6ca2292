#include "ledger.h"

#define PAGES_PER_WORD 32

/* Rows: event. Columns: MISSING, REQUESTED, PRESENT, ZERO.
 *
 * A fault on a PRESENT page means that a message was under way while the page came, or that the page was removed after
 * the message: a page that is gone again can only be zero, and one that is there answers EEXIST and is woken. So both
 * PRESENT and ZERO ask for ZERO_FILL. A page that is ZERO stays ZERO when it is filled: nothing more is owed to it.
 */
static const struct page_transition table[PAGE_EVENTS][PAGE_STATES] = {
	[PAGE_FAULTED] = {
		{ PAGE_REQUESTED, PAGE_FETCH },
		{ PAGE_REQUESTED, PAGE_WAIT },
		{ PAGE_PRESENT, PAGE_ZERO_FILL },
		{ PAGE_ZERO, PAGE_ZERO_FILL },
	},
	[PAGE_CLAIMED] = {
		{ PAGE_REQUESTED, PAGE_FETCH },
		{ PAGE_REQUESTED, PAGE_NOTHING },
		{ PAGE_PRESENT, PAGE_NOTHING },
		{ PAGE_ZERO, PAGE_NOTHING },
	},
	[PAGE_ARRIVED] = {
		{ PAGE_PRESENT, PAGE_INSTALL },
		{ PAGE_PRESENT, PAGE_INSTALL },
		{ PAGE_PRESENT, PAGE_DISCARD },
		{ PAGE_ZERO, PAGE_DISCARD },
	},
	[PAGE_IS_ZERO] = {
		{ PAGE_ZERO, PAGE_ZERO_FILL },
		{ PAGE_ZERO, PAGE_ZERO_FILL },
		{ PAGE_PRESENT, PAGE_DISCARD },
		{ PAGE_ZERO, PAGE_NOTHING },
	},
	[PAGE_LOST] = {
		{ PAGE_MISSING, PAGE_NOTHING },
		{ PAGE_MISSING, PAGE_NOTHING },
		{ PAGE_PRESENT, PAGE_NOTHING },
		{ PAGE_ZERO, PAGE_NOTHING },
	},
	[PAGE_REMOVED] = {
		{ PAGE_ZERO, PAGE_NOTHING },
		{ PAGE_ZERO, PAGE_NOTHING },
		{ PAGE_ZERO, PAGE_NOTHING },
		{ PAGE_ZERO, PAGE_NOTHING },
	},
};

uint64_t ledger_bytes(uint64_t pages)
{
	return (pages + PAGES_PER_WORD - 1) / PAGES_PER_WORD * sizeof(uint64_t);
}

static unsigned shift_of(uint64_t page)
{
	return (unsigned)(page % PAGES_PER_WORD) * 2;
}

/* A word with the pattern `state` in each of its 32 places. */
static uint64_t pattern(enum page_state state)
{
	return 0x5555555555555555ull * (uint64_t)state;
}

/* One bit, at the even places, for each page of `word` that is in `state`. */
static uint64_t matches(uint64_t word, enum page_state state)
{
	uint64_t diff = word ^ pattern(state);

	return ~(diff | diff >> 1) & 0x5555555555555555ull;
}

void ledger_init(struct ledger *ledger, uint64_t *words, uint64_t pages)
{
	uint64_t full = pages / PAGES_PER_WORD;

	*ledger = (struct ledger){ .words = words, .pages = pages };
	for (uint64_t i = 0; i < full; i++)
		for (int s = 0; s < PAGE_STATES; s++)
			ledger->count[s] += (uint64_t)__builtin_popcountll(matches(words[i], s));
	for (uint64_t page = full * PAGES_PER_WORD; page < pages; page++)
		ledger->count[ledger_state(ledger, page)]++;
}

struct page_transition ledger_transition(enum page_event event, enum page_state state)
{
	return table[event][state];
}

enum page_state ledger_state(const struct ledger *ledger, uint64_t page)
{
	return (enum page_state)(ledger->words[page / PAGES_PER_WORD] >> shift_of(page) & 3);
}

enum page_command ledger_apply(struct ledger *ledger, enum page_event event, uint64_t page)
{
	uint64_t *word = &ledger->words[page / PAGES_PER_WORD];
	enum page_state state = ledger_state(ledger, page);
	struct page_transition to = table[event][state];

	if (to.next != state) {
		*word ^= (uint64_t)(state ^ to.next) << shift_of(page);
		ledger->count[state]--;
		ledger->count[to.next]++;
	}
	return (enum page_command)to.command;
}

/* The same for a whole word: each of its pages moves as the table says. */
static uint64_t apply_word(struct ledger *ledger, enum page_event event, uint64_t *word)
{
	uint64_t before = *word, after = 0, changed = 0;

	for (int s = 0; s < PAGE_STATES; s++) {
		uint64_t places = matches(before, s);
		uint64_t number = (uint64_t)__builtin_popcountll(places);
		uint8_t next = table[event][s].next;

		after |= places * next;
		if (next != s) {
			ledger->count[s] -= number;
			ledger->count[next] += number;
			changed += number;
		}
	}
	if (changed)
		*word = after;
	return changed;
}

uint64_t ledger_apply_range(struct ledger *ledger, enum page_event event, uint64_t first, uint64_t count)
{
	uint64_t page = first, end = first + count, changed = 0;

	while (page < end) {
		if (page % PAGES_PER_WORD == 0 && end - page >= PAGES_PER_WORD) {
			changed += apply_word(ledger, event, &ledger->words[page / PAGES_PER_WORD]);
			page += PAGES_PER_WORD;
		} else {
			enum page_state before = ledger_state(ledger, page);

			ledger_apply(ledger, event, page);
			changed += before != ledger_state(ledger, page);
			page++;
		}
	}
	return changed;
}

uint64_t ledger_find(const struct ledger *ledger, enum page_state state, uint64_t first, uint64_t end)
{
	uint64_t page = first;

	while (page < end) {
		uint64_t found = matches(ledger->words[page / PAGES_PER_WORD], state) >> shift_of(page);

		if (found) {
			page += (uint64_t)__builtin_ctzll(found) / 2;
			return page < end ? page : end;
		}
		page += PAGES_PER_WORD - page % PAGES_PER_WORD;
	}
	return end;
}

uint64_t ledger_run(const struct ledger *ledger, unsigned mask, uint64_t first, uint64_t end)
{
	uint64_t page = first;

	while (page < end) {
		uint64_t word = ledger->words[page / PAGES_PER_WORD], inside = 0, outside;

		for (int s = 0; s < PAGE_STATES; s++)
			if (mask >> s & 1)
				inside |= matches(word, s);
		outside = (~inside & 0x5555555555555555ull) >> shift_of(page);
		if (outside) {
			page += (uint64_t)__builtin_ctzll(outside) / 2;
			return (page < end ? page : end) - first;
		}
		page += PAGES_PER_WORD - page % PAGES_PER_WORD;
	}
	return end - first;
}
