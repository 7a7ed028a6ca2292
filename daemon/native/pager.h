/* One VM's memory while it arrives: messages of its userfaultfd and replies of its source go in; requests come out, and
 * pages are installed and threads woken on the way. One call a batch, never one a page.
 *
 * The ledger decides, this file's functions act. All of them are called from one thread. What must survive the process
 * lies in the state memory (state.h); what is here can be made again from it.
 *
 * Order, which makes dying at any instant harmless: a message is in the inbox before it is acted upon; a page is marked
 * PRESENT after it is installed; a waiter is forgotten after it was woken. What was half done is done again: installing
 * again answers EEXIST, waking again is harmless, REQUESTED is read as MISSING by the next process.
 */
#ifndef POSTCOPY_PAGER_H
#define POSTCOPY_PAGER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "exit_ring.h"
#include "extents.h"
#include "histogram.h"
#include "inflight.h"
#include "ledger.h"
#include "state.h"
#include "uffd.h"
#include "waiters.h"
#include "wire.h"

#define WANTED_SLOTS 4096u
#define HOT_SPOTS 32u
#define FORKS_MAX 16u
#define ANSWERS_MAX 1024u

/* What the caller has to do next: bits of the return value of drain, feed, retry, mark_zero. */
enum pager_signal {
	PAGER_SEND = 1,	    /* demand requests are waiting: pager_encode_demand */
	PAGER_MORE = 2,	    /* stopped at its limit: call pager_drain again soon */
	PAGER_STALLED = 4,  /* something must be tried again later: pager_retry after a pause */
	PAGER_GONE = 8,	    /* the VMM's address space is gone */
	PAGER_SHORT = 16,   /* no memory or huge page; implies STALLED */
	PAGER_FAILED = 32,  /* the kernel answered outside of all policy: pager.failure */
	PAGER_RING_BROKEN = 128, /* the exit ring is not served any more: pager.ring_error */
	PAGER_ANSWERS = 256, /* forwarded exits were answered: pager_take_answers */
	PAGER_HELD = 512, /* the userfaultfd was not read, as a vCPU installs a page: again at its doorbell, or later */
	PAGER_DISTRUST = 64 /* the stream's replies make no sense: drop the connection */
};

struct pager_failure {
	uint32_t op; /* enum uffd_op; UFFD_OPS: read */
	int32_t error;
	uint64_t addr;
	uint64_t len_bytes;
};

/* A fault exit that somebody forwarded and whose page can be touched now. */
struct pager_answer {
	uint64_t page;
	uint64_t len_bytes; /* of the page */
	uint32_t vcpu;
	uint32_t zero; /* 1: it is zero by right, its content never came */
};

struct pager_stats {
	uint64_t pages, missing, requested, present, zero;
	struct counters counters;
	uint64_t waiting;
	uint64_t oldest_wait_ns;
	uint64_t latency_count, latency_p50_ns, latency_p90_ns, latency_p99_ns, latency_max_ns, latency_sum_ns;
	uint64_t latency_log2_us[32];
	uint64_t bulk_inflight_bytes;
	uint64_t demand_inflight;
	uint32_t threads;
};

struct pager {
	struct state_header *state;
	struct region *region;
	struct extents *extents;
	struct uffd_msg *inbox;
	struct counters *counters;
	struct ledger ledger;
	struct inflight inflight;
	struct waiters waiters;
	const struct uffd_edge *edge;
	int uffd;
	unsigned signals;
	struct pager_failure failure;
	struct exit_ring *ring; /* &ring_memory, or NULL */
	struct exit_ring ring_memory;
	int ring_error;
	bool forwarded;	      /* exits come by pager_external_fault */
	uint32_t outstanding; /* forwarded exits that were not taken as answers */
	uint32_t answers;
	struct pager_answer answer[ANSWERS_MAX];

	uint64_t wanted[WANTED_SLOTS]; /* pages to ask for at once; free-running indices */
	uint32_t wanted_head, wanted_tail;
	uint64_t hot[HOT_SPOTS]; /* blocks around recent faults, newest at hot_next - 1 */
	uint32_t hot_next, hot_count;
	uint64_t bulk_cursor;
	uint64_t bulk_inflight_bytes;
	uint64_t max_range_bytes;
	uint32_t max_ranges; /* outstanding on a stream, and so in a lane */
	uint32_t bad_streak;
	bool draining;
	bool retrying;
	bool map_changed;
	bool inherited;	 /* the inbox may hold messages that another process read */
	bool overflowed; /* threads wait that are in no table */
	bool poisoned;	 /* what waiters get is an error */
	uint32_t forks;
	int fork[FORKS_MAX]; /* userfaultfds of the VMM's children, ours to close */
};

/* Bytes of state memory for `pages` pages: a multiple of 4096. */
uint64_t pager_state_bytes(uint64_t pages);

/* Make a pager over fresh (all zero) state memory of pager_state_bytes(pages of `regions`). NULL: no memory, or the
 * regions do not fit the layout. `state` must outlive the pager; `uffd` stays the caller's. */
struct pager *pager_create(void *state, uint64_t len_bytes, const struct region *regions, uint32_t count, int uffd,
			   const struct uffd_edge *edge);

/* Take over state memory that another process left: REQUESTED becomes MISSING and every range is woken, so that what was
 * read and not answered is asked again by its thread. The inbox is read by the first pager_drain. NULL: not ours, of
 * a version we do not know, or inconsistent. */
struct pager *pager_adopt(void *state, uint64_t len_bytes, int uffd, const struct uffd_edge *edge);

void pager_destroy(struct pager *pager);

/* Read and answer what the kernel has. */
unsigned pager_drain(struct pager *pager);

/* Take one PageReply: check it against what was asked, install, wake. Returns signals, or -1 if the stream cannot be
 * trusted any more (DISTRUST). The shape that transports call; `context` is the pager. */
int pager_feed(void *context, const uint8_t *message, size_t len);

/* Go through everything that is owed again: ask for what is MISSING, fill what is ZERO, wake what is there. */
unsigned pager_retry(struct pager *pager);

/* [offset, offset + len) of the image is zero, as the source knows without reading. */
unsigned pager_mark_zero(struct pager *pager, uint64_t offset, uint64_t len_bytes);

/* [offset, offset + len) of the image is in place already (pre-copied before the switch-over). */
void pager_mark_present(struct pager *pager, uint64_t offset, uint64_t len_bytes);
/* The same for every 4 KiB page of the image whose bit is set: bit n % 8 of byte n / 8. What lies behind `len_bytes` of bitmap
 * is not in place. */
void pager_mark_present_bitmap(struct pager *pager, const uint8_t *bitmap, uint64_t len_bytes);

/* Signals raised since they were last taken, by any call. */
unsigned pager_take_signals(struct pager *pager);

/* Write the ranges of a PageRequest, ready to send; returns its length, 0 if there is nothing to ask or no room. */
size_t pager_encode_demand(struct pager *pager, uint8_t *out, size_t capacity);

/* The same for the background push: claims up to `want_bytes` of MISSING pages, near recent faults first, in runs of at
 * most `run_bytes`. *claimed_bytes is what was asked for. */
size_t pager_encode_bulk(struct pager *pager, uint64_t want_bytes, uint64_t run_bytes, uint8_t *out, size_t capacity,
			 uint64_t *claimed_bytes);

/* The stream of a lane is gone: what it owed is MISSING again. Call pager_retry when there is another. */
void pager_reset_lane(struct pager *pager, enum lane lane);

/* True when nothing is owed: no page MISSING or REQUESTED, nobody waiting, and what another process read worked off. */
bool pager_is_complete(const struct pager *pager);

/* UNREGISTER every extent: the kernel fills what is ZERO from now on. 0 or the last errno. */
int pager_release(struct pager *pager);

/* After pager_release: read what the VMM announced meanwhile, as its thread waits for that. True: nothing comes any more. False:
 * a thread is on its way to wait; call again, for if nobody reads its event it waits for ever. */
bool pager_let_go(struct pager *pager);

/* Poison every page that is not here: whoever touches one sees a memory error rather than hang. False: the kernel cannot,
 * and the guest still waits. */
bool pager_poison_missing(struct pager *pager);

/* Not of exit_ring.h: the ring itself is sound. */
#define EXIT_RING_OUTSIDE -100 /* a fault at an address that no region has */

/* Serve the exit ring in `mem`, which outlives the pager: a fresh one, or one that an earlier process served. 0, or an
 * error of exit_ring.h. local: the VMM has the source's own file, and its vCPUs may install from it. */
int pager_attach_ring(struct pager *pager, void *mem, size_t len, bool local);

/* The ring's doorbell is readable: empty it, then drain everything. */
unsigned pager_on_doorbell(struct pager *pager, int doorbell);

/* Ask for [gpa, gpa + len) at once, though nobody waits yet: what a vCPU's kernel reads by itself (page tables). */
void pager_want_gpa(struct pager *pager, uint64_t gpa, uint64_t len_bytes);

/* Take fault exits that the VMM forwards in messages of its own. Not together with a ring. */
void pager_forward_exits(struct pager *pager);

/* What pager_external_fault says instead of a page's number. */
#define EXTERNAL_OUTSIDE -1 /* no region has it */
#define EXTERNAL_FULL -2    /* ANSWERS_MAX exits are outstanding, or the table of waiters is full */

/* vCPU `vcpu` (below WAITER_EXIT) waits for the page at guest physical address `address`, or with `is_offset` at that offset in
 * the image. Returns the page's number; the same vCPU and page again count once as long as they are not answered. */
int64_t pager_external_fault(struct pager *pager, uint64_t address, bool is_offset, uint32_t vcpu);

/* Move up to `room` answers to `out`; returns how many. Each accepted fault comes up once. */
uint32_t pager_take_answers(struct pager *pager, struct pager_answer *out, uint32_t room);

void pager_get_stats(const struct pager *pager, struct pager_stats *stats);

/* Shared by the pager's own files. */
uint64_t pager_now_ns(void);
const struct region *pager_region_of_page(const struct pager *pager, uint64_t page);
void pager_zero_fill(struct pager *pager, uint64_t page);
void pager_settle_zero(struct pager *pager, uint64_t first, uint64_t count);
void pager_install(struct pager *pager, enum lane lane, uint64_t first, uint64_t count, const uint8_t *data);
void pager_want(struct pager *pager, uint64_t page);
void pager_note_hot(struct pager *pager, uint64_t page);
void pager_on_waiter(struct pager *pager, uint64_t page, uint32_t tid, uint64_t now_ns);
void pager_drain_exits(struct pager *pager);
void pager_mark_resident(struct pager *pager, uint64_t first, uint64_t count, bool resident);
void pager_fail(struct pager *pager, enum uffd_op op, int error, uint64_t hva, uint64_t len_bytes);

static inline uint64_t region_offset_of_page(const struct region *region, uint64_t page)
{
	return region->image_offset + ((page - region->first_page) << region->page_shift);
}

static inline uint64_t region_end_page(const struct region *region)
{
	return region->first_page + (region->len_bytes >> region->page_shift);
}

#endif
