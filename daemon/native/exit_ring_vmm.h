/* The VMM's side of an exit ring: formatting one, and one lane as its vCPU uses it.
 *
 * A lane is used by one thread at a time, its vCPU's. The daemon is believed not to lie about memory content, but what it
 * writes here is checked all the same: a completion that was not asked for is an error, never an access out of bounds.
 */
#ifndef POSTCOPY_EXIT_RING_VMM_H
#define POSTCOPY_EXIT_RING_VMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "exit_ring_abi.h"

/* The VMM's end of a ring. Geometry is kept here and never read back from shared memory. */
struct exit_ring_end {
	struct exit_ring_header *header;
	uint64_t *residency;
	uint64_t residency_pages;
	uint32_t vcpus;
};

/* A vCPU's end of its lane. */
struct exit_lane_end {
	struct exit_ring_header *header;
	struct exit_ring_lane *lane;
	uint32_t vcpu;
	uint32_t count;	    /* faults of the batch under way; 0: idle */
	uint32_t collected; /* of those, answered */
	uint64_t sequence;  /* of the batch's first fault */
	uint32_t answered;  /* bit a fault of the batch */
	bool poisoned;	    /* one of them was answered so */
	uint64_t gpa[EXIT_RING_ENTRIES];
};

enum exit_lane_state {
	EXIT_LANE_IDLE,	    /* nothing is under way, or all of it was answered just now */
	EXIT_LANE_WAITING,  /* answers are outstanding */
	EXIT_LANE_POISONED, /* all answered, and a page will never come */
	EXIT_LANE_BROKEN,   /* the daemon wrote nonsense; the lane cannot be used any more */
};

/* Bytes of a ring for so many vCPUs and pages of image; 0 if that is too many of either. */
uint64_t exit_ring_bytes(uint32_t vcpus, uint64_t residency_pages);

/* Make a ring in `mem`, exit_ring_bytes() long and zero. No residency bitmap for 0 pages. local: the image is at hand. */
void exit_ring_format(struct exit_ring_end *end, void *mem, uint32_t vcpus, uint64_t residency_pages, bool local);

/* vcpu < vcpus */
void exit_lane_init(struct exit_lane_end *end, const struct exit_ring_end *ring, uint32_t vcpu);

/* Post a batch of 1 to EXIT_RING_ENTRIES faults into an idle lane. True: the daemon sleeps, write its doorbell. */
bool exit_lane_post(struct exit_lane_end *end, const uint64_t *gpa, uint32_t count, uint32_t flags);

/* Take what was answered. Never blocks. */
enum exit_lane_state exit_lane_collect(struct exit_lane_end *end);

/* Whether there is something to collect. */
bool exit_lane_has_news(const struct exit_lane_end *end);

/* Give up on answers: the daemon said that everything is in place, and is gone. The lane is not used again. */
void exit_lane_abandon(struct exit_lane_end *end);

/* Say that the vCPU is about to sleep and return the value of the futex word to sleep on; look once more (has_news, and
 * whatever else ends the sleep) between this and FUTEX_WAIT. */
uint32_t exit_lane_doze(struct exit_lane_end *end);
void exit_lane_rouse(struct exit_lane_end *end);

/* Change the futex word, so that a vCPU between doze and FUTEX_WAIT does not sleep; follow with FUTEX_WAKE. Any thread, and
 * from a signal handler. */
void exit_lane_nudge(struct exit_lane_end *end);

/* Feature LOCAL: say that the vCPU's thread is about to install a page. True: it may, until exit_lane_leave. False: it may not,
 * and must ask. Either way leave. */
bool exit_lane_enter(struct exit_lane_end *end);
/* True: the daemon waits for this, write its doorbell. */
bool exit_lane_leave(struct exit_lane_end *end);

/* Note that 4 KiB pages of the image are in guest memory, between enter and leave. */
void exit_ring_note_resident(const struct exit_ring_end *end, uint64_t page, uint64_t count);

/* Whether the daemon says that 4 KiB page `page` of the image is in guest memory. False where nobody knows. */
bool exit_ring_is_resident(const struct exit_ring_end *end, uint64_t page);

/* Whether the daemon let go of this VM: everything is there. */
bool exit_ring_is_complete(const struct exit_ring_end *end);

#endif
