/* The daemon's side of an exit ring. The VMM on the other side is hostile until checked.
 *
 * Nothing in shared memory is believed twice: geometry is copied once by exit_ring_attach, an entry is copied before it is
 * looked at, and the daemon's own indices live here and are only ever published. A call touches no lock and does bounded
 * work; the only system calls are FUTEX_WAKE, when a vCPU says that it sleeps, and reading the doorbell.
 *
 * All functions of one ring are called from one thread.
 *
 * The loop:
 *	for (;;) {
 *		exit_ring_drain(ring, faults, MAX, &n);	   -> resolve each, later exit_ring_complete()
 *		if (n == MAX) yield to other work, then go on;
 *		else if (exit_ring_arm(ring)) break;	   -> sleep until the doorbell is readable
 *	}
 *	when it is: exit_ring_quiet(doorbell), and again.
 */
#ifndef POSTCOPY_EXIT_RING_H
#define POSTCOPY_EXIT_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "exit_ring_abi.h"

/* Why a ring cannot be served (any more). Negative, so that it can share a return value with a count. */
enum exit_ring_error {
	EXIT_RING_OK = 0,
	EXIT_RING_NOT_MEMFD = -1,     /* not a memfd of ordinary pages, or not to be mapped */
	EXIT_RING_NOT_SEALED = -2,    /* it could be truncated under us: SIGBUS */
	EXIT_RING_TOO_SMALL = -3,     /* shorter than its header, or than its header says */
	EXIT_RING_NOT_RING = -4,      /* magic */
	EXIT_RING_OTHER_VERSION = -5,
	EXIT_RING_OTHER_FEATURES = -6, /* a feature that this version does not know */
	EXIT_RING_BAD_GEOMETRY = -7,
	EXIT_RING_INDEX = -8,	      /* an index jumped, or more was posted than a lane holds */
	EXIT_RING_VCPU = -9,	      /* a vCPU that was not announced */
	EXIT_RING_RECORD = -10,	      /* an entry that contradicts itself */
	EXIT_RING_NOT_OWED = -11,     /* ours: completing what is not outstanding */
	EXIT_RING_NO_MEMORY = -12,
};

struct exit_fault {
	uint64_t gpa;
	uint64_t sequence;
	uint32_t flags;
	uint32_t vcpu;
};

/* What the daemon knows of a lane. */
struct exit_lane {
	uint32_t head;	   /* faults posted, as last seen */
	uint32_t taken;	   /* faults taken */
	uint32_t done;	   /* completions given */
	uint32_t released; /* done_tail, as last seen and found sound */
	uint16_t owed;	   /* slots taken and not completed */
	uint16_t skip;	   /* slots of this batch that an earlier daemon completed */
	uint64_t gpa[EXIT_RING_ENTRIES];
	uint64_t sequence[EXIT_RING_ENTRIES];
};

struct exit_ring {
	struct exit_ring_header *header;
	size_t len;
	uint64_t lane_offset;
	uint32_t lane_bytes;
	uint32_t vcpus;
	uint64_t features;
	uint64_t *residency; /* NULL without the feature */
	uint64_t residency_pages;
	bool local; /* vCPUs may install, between holds */
	struct exit_lane *lane;
	uint64_t backlog[EXIT_RING_PENDING_WORDS]; /* lanes known to have something new */
	uint32_t cursor;			   /* where the next drain begins, so that no lane starves */
	uint64_t faults, completions, wakes, doorbells;
};

/* Map the memfd that a VMM handed over: sealed against shrinking, of ordinary pages (a hugetlb page that cannot be had is
 * SIGBUS), of a sane length. The caller unmaps. */
int exit_ring_map(int fd, void **mem, size_t *len);
void exit_ring_unmap(void *mem, size_t len);

/* Check `mem` and take it over, from a VMM that just handed it over or from a daemon that died: what that one had taken and
 * not completed is delivered again by the next drain, and sleeping vCPUs whose answers are there are woken. On error nothing
 * is kept. */
int exit_ring_attach(struct exit_ring *ring, void *mem, size_t len);
void exit_ring_detach(struct exit_ring *ring);

/* Feature LOCAL: let vCPUs' threads install what they miss from a file that the caller found to be the source's own. Until the
 * first exit_ring_open they are held, so that what an earlier daemon had read is acted upon before. Nothing happens after SHUT,
 * or without the feature; exit_ring_attach does it where an earlier daemon had. */
void exit_ring_allow_local(struct exit_ring *ring);

/* Before the userfaultfd is read: from now on nobody begins to install. False: somebody is in the middle of it, who will ring
 * the doorbell; nothing may be read until a call says true. For who never was allowed, always true. */
bool exit_ring_hold(struct exit_ring *ring);
/* After what was read is acted upon. */
void exit_ring_open(struct exit_ring *ring);
/* Memory was given back, moved or lost: nobody installs by himself any more. Within hold, or where it does not matter. */
void exit_ring_shut(struct exit_ring *ring);

/* Take up to `max` (> 0) faults; *count says how many, also on error: those before the bad one. *count == max: there may be
 * more. After an error the ring must not be used but for exit_ring_detach. */
int exit_ring_drain(struct exit_ring *ring, struct exit_fault *out, unsigned max, unsigned *count);

/* Ask for the doorbell. False: something is pending already; drain instead of sleeping. */
bool exit_ring_arm(struct exit_ring *ring);

/* Empty the doorbell. Never blocks, whatever flags the VMM sets on the shared eventfd. False: not an eventfd, or gone. */
bool exit_ring_quiet(int doorbell);

/* Answer one fault. The vCPU is woken with the last of its batch. The page must be in place (and marked) before.
 * EXIT_RING_NOT_OWED: no such fault is outstanding; nothing happened. */
int exit_ring_complete(struct exit_ring *ring, uint32_t vcpu, uint64_t gpa, uint64_t sequence, uint32_t status);

/* Tell the VMM which pages of the image are in guest memory: set after installing, cleared before the answer to a REMOVE's
 * reader returns. Pages behind the bitmap are ignored. No-op without the feature. */
void exit_ring_mark(struct exit_ring *ring, uint64_t first_page, uint64_t count, bool resident);

/* All is in place and the userfaultfd is let go: the VMM needs nobody any more. Before the VMM's socket is closed, as that is
 * how it tells an end from a crash. */
void exit_ring_set_complete(struct exit_ring *ring);

/* One sentence for the operator. */
const char *exit_ring_error_text(int error);

#endif
