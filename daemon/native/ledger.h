/* The state of every page: two bits each, in memory the caller owns (a memfd, so that it survives the process).
 *
 * Sans-IO: events go in, commands come out; no descriptor, clock or allocation here. What an event does to a page is
 * the table in ledger.c, from which docs/architecture.md draws its diagram.
 */
#ifndef POSTCOPY_LEDGER_H
#define POSTCOPY_LEDGER_H

#include <stdint.h>

enum page_state {
	PAGE_MISSING = 0,   /* at the source only; a fresh ledger is all MISSING */
	PAGE_REQUESTED = 1, /* asked for; an answer is outstanding */
	PAGE_PRESENT = 2,   /* installed in the guest */
	PAGE_ZERO = 3,	    /* zero by right: the source said so, or the guest removed it */
	PAGE_STATES = 4,
};

enum page_event {
	PAGE_FAULTED = 0,   /* a thread waits for it */
	PAGE_CLAIMED = 1,   /* the background push takes it */
	PAGE_ARRIVED = 2,   /* its content came and is being installed */
	PAGE_IS_ZERO = 3,   /* the source says that it is zero */
	PAGE_LOST = 4,	    /* the answer will not come, or could not be used */
	PAGE_REMOVED = 5,   /* the guest gave it back: balloon, MADV_DONTNEED, unmap */
	PAGE_EVENTS = 6,
};

enum page_command {
	PAGE_NOTHING = 0,
	PAGE_FETCH = 1,	    /* ask the source */
	PAGE_WAIT = 2,	    /* asked already */
	PAGE_INSTALL = 3,   /* put the content in place and wake */
	PAGE_ZERO_FILL = 4, /* put a zero page in place and wake; wake alone if something is there */
	PAGE_DISCARD = 5,   /* the content is not wanted: already there, or removed meanwhile */
	PAGE_COMMANDS = 6,
};

struct page_transition {
	uint8_t next;
	uint8_t command;
};

struct ledger {
	uint64_t *words; /* 32 pages a word, page 0 in the lowest bits */
	uint64_t pages;
	uint64_t count[PAGE_STATES];
};

/* Bytes that the states of `pages` pages take: a multiple of 8. */
uint64_t ledger_bytes(uint64_t pages);

/* Take `words` (ledger_bytes(pages) long, zero for a fresh one) and count its states. */
void ledger_init(struct ledger *ledger, uint64_t *words, uint64_t pages);

/* What `event` does to a page in `state`. Never an error: every pair is in the table. */
struct page_transition ledger_transition(enum page_event event, enum page_state state);

enum page_state ledger_state(const struct ledger *ledger, uint64_t page);

/* Apply an event to one page and return the command. page < pages. */
enum page_command ledger_apply(struct ledger *ledger, enum page_event event, uint64_t page);

/* Apply an event to [first, first + count) and return how many changed state. Commands are the caller's to derive. */
uint64_t ledger_apply_range(struct ledger *ledger, enum page_event event, uint64_t first, uint64_t count);

/* First page in [first, end) that is in `state`, or `end`. Skips 32 pages at a time. */
uint64_t ledger_find(const struct ledger *ledger, enum page_state state, uint64_t first, uint64_t end);

/* Length of the run from `first`, at most to `end`, whose states are all in `mask` (1 << state). */
uint64_t ledger_run(const struct ledger *ledger, unsigned mask, uint64_t first, uint64_t end);

#endif
