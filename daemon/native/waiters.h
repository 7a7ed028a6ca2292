/* Who waits for which page since when: the unanswered faults, and how long each thread stood still.
 *
 * This table, not the requests, is the truth about what is owed: whatever goes wrong, going through it again makes
 * every debt good. One entry per (page, thread); a thread id of 0 means unknown, and then one entry per page.
 */
#ifndef POSTCOPY_WAITERS_H
#define POSTCOPY_WAITERS_H

#include <stdbool.h>
#include <stdint.h>

#include "histogram.h"

#define WAITERS_MAX 16384u
#define BLOCKED_THREADS_MAX 1024u

struct waiter {
	uint64_t page; /* UINT64_MAX: empty */
	uint64_t since_ns;
	uint32_t tid;
	uint32_t reserved;
};

/* In a thread id: the waiter is a vCPU that reported by exit, and the rest is its number. Linux's thread ids are below 2^22. */
#define WAITER_EXIT 0x80000000u

struct blocked_thread {
	uint32_t tid;
	uint32_t reserved;
	uint64_t faults;
	uint64_t blocked_ns;
};

struct waiters {
	struct waiter *slot; /* open addressing by page */
	uint32_t slots;	     /* a power of two, at least twice `count` */
	uint32_t count;
	struct histogram latency;
	struct blocked_thread thread[BLOCKED_THREADS_MAX]; /* [0] is for unknown threads and those beyond the table */
	uint32_t threads;
	/* Called for each exit's waiter that is answered; NULL: there are none. */
	void (*answered)(void *context, const struct waiter *entry);
	void *context;
};

/* False if there is no memory. */
bool waiters_init(struct waiters *waiters);
void waiters_deinit(struct waiters *waiters);

/* How many more can be noted. */
uint32_t waiters_room(const struct waiters *waiters);

/* Note a waiter; *first is set if the page had none. False if there is no room: nothing noted. */
bool waiters_add(struct waiters *waiters, uint64_t page, uint32_t tid, uint64_t now_ns, bool *first);

bool waiters_has(const struct waiters *waiters, uint64_t page);
bool waiters_has_thread(const struct waiters *waiters, uint64_t page, uint32_t tid);

/* The pages of [first, first + count) were answered: account and forget. Returns how many waiters that were. */
uint32_t waiters_resolve(struct waiters *waiters, uint64_t first, uint64_t count, uint64_t now_ns);

/* Next waiter at or behind slot *at, or NULL; *at moves behind it. Resolving its page moves later entries forward: when it
 * did, look at the slot again (--*at), so that none is passed over. */
const struct waiter *waiters_next(const struct waiters *waiters, uint32_t *at);

/* When the longest waiting began, or 0. */
uint64_t waiters_oldest_ns(const struct waiters *waiters);

#endif
