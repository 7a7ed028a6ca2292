/* postcopy_wait, postcopy_kick, postcopy_populate: a vCPU that waits. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "local.h"
#include "memory.h"

/* FUTEX_WAIT without a time-out is restarted after a handler with SA_RESTART, and the kick would be lost; with one it
 * returns EINTR whatever the handler's flags. Source: kernel/futex/waitwake.c, ERESTARTSYS and ERESTART_RESTARTBLOCK. */
static const struct timespec one_day = { .tv_sec = 86400 };

static bool take_kick(struct vcpu_side *vcpu)
{
	return __atomic_load_n(&vcpu->kicked, __ATOMIC_RELAXED) &&
	       __atomic_exchange_n(&vcpu->kicked, 0, __ATOMIC_SEQ_CST);
}

/* Sleep until something is answered. False: interrupted. */
static bool sleep_once(const struct postcopy *pc, struct vcpu_side *vcpu)
{
	uint32_t word = exit_lane_doze(&vcpu->lane);
	bool interrupted = false;

	/* From here on an answer, a kick or the end changes the word. */
	if (!exit_lane_has_news(&vcpu->lane) && !__atomic_load_n(&vcpu->kicked, __ATOMIC_SEQ_CST) &&
	    !exit_ring_is_complete(&pc->ring))
		interrupted = syscall(SYS_futex, &vcpu->lane.lane->wake, FUTEX_WAIT, word, &one_day, NULL, 0) < 0 &&
			      errno == EINTR;
	exit_lane_rouse(&vcpu->lane);
	return !interrupted;
}

/* Wait for the batch under way. */
static enum postcopy_wait wait_for_lane(const struct postcopy *pc, struct vcpu_side *vcpu)
{
	for (;;) {
		/* First, so that a kick is never lost to an answer that came at the same time. */
		if (take_kick(vcpu))
			return POSTCOPY_INTERRUPTED;
		/* The daemon that said so is not there to answer. */
		if (exit_ring_is_complete(&pc->ring))
			exit_lane_abandon(&vcpu->lane);
		switch (exit_lane_collect(&vcpu->lane)) {
		case EXIT_LANE_IDLE:
			return POSTCOPY_RESUMED;
		case EXIT_LANE_POISONED:
			return POSTCOPY_LOST;
		case EXIT_LANE_BROKEN:
			return POSTCOPY_BROKEN;
		case EXIT_LANE_WAITING:
			break;
		}
		if (!sleep_once(pc, vcpu))
			return POSTCOPY_INTERRUPTED;
	}
}

enum postcopy_wait postcopy_wait(struct postcopy *pc, uint32_t vcpu_index)
{
	struct vcpu_side *vcpu = &pc->vcpu[vcpu_index];

	if (vcpu->want_count && !vcpu->lane.count) {
		local_install(pc, vcpu);
		if (vcpu->want_count && exit_lane_post(&vcpu->lane, vcpu->want, vcpu->want_count, vcpu->want_flags))
			ring_doorbell(pc);
	}
	vcpu->want_count = 0;
	return wait_for_lane(pc, vcpu);
}

void postcopy_kick(struct postcopy *pc, uint32_t vcpu_index)
{
	struct vcpu_side *vcpu = &pc->vcpu[vcpu_index];
	int saved = errno; /* a signal handler's caller must not notice */

	__atomic_store_n(&vcpu->kicked, 1, __ATOMIC_SEQ_CST);
	exit_lane_nudge(&vcpu->lane);
	syscall(SYS_futex, &vcpu->lane.lane->wake, FUTEX_WAKE, 1, NULL, NULL, 0);
	errno = saved;
}

/* Put the next missing pages of the pinned set into the vCPU's wishes. False: there are no more. */
static bool next_pinned(struct postcopy *pc, struct vcpu_side *vcpu)
{
	while (pc->populate_range < pc->pinned_count && vcpu->want_count < POSTCOPY_PAGES_MAX) {
		const struct postcopy_range *range = &pc->pinned[pc->populate_range];
		uint64_t gpa = range->gpa + pc->populate_offset, page;

		if (pc->populate_offset >= range->size) {
			pc->populate_range++;
			pc->populate_offset = 0;
			continue;
		}
		page = memory_page(pc, gpa);
		if (postcopy_is_missing(pc, page))
			vcpu->want[vcpu->want_count++] = page;
		/* To the next page, whatever its size. */
		pc->populate_offset += memory_region(pc, gpa) ? memory_region(pc, gpa)->page_size - (gpa - page) : PAGE_BYTES;
	}
	return vcpu->want_count != 0;
}

enum postcopy_wait postcopy_populate(struct postcopy *pc, uint32_t vcpu_index)
{
	struct vcpu_side *vcpu = &pc->vcpu[vcpu_index];
	enum postcopy_wait result = wait_for_lane(pc, vcpu);

	vcpu->want_flags = 0;
	while (result == POSTCOPY_RESUMED && next_pinned(pc, vcpu))
		result = postcopy_wait(pc, vcpu_index);
	return result;
}
