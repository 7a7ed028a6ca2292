#define _GNU_SOURCE
#include "local.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "memory.h"

void ring_doorbell(struct postcopy *pc)
{
	uint64_t one = 1;
	ssize_t written;

	/* EAGAIN: the counter is full, so the daemon has been rung already. */
	do
		written = write(pc->doorbell, &one, sizeof(one));
	while (written < 0 && errno == EINTR);
}

/* True: the page is in place, or was. Any other answer (the mapping changes, the file was cut, no memory) is the daemon's to deal
 * with, also EEXIST of a huge page: the kernel says that too when it has none to give. */
static bool install(const struct postcopy *pc, uint64_t gpa)
{
	const struct postcopy_region *region = memory_region(pc, gpa);
	uint64_t offset = region->image_offset + (gpa - region->gpa);
	struct uffdio_copy copy = { .dst = region->hva + (gpa - region->gpa), .len = region->page_size };

	if (offset > pc->image_len || region->page_size > pc->image_len - offset)
		return false;
	copy.src = (uintptr_t)pc->image + offset;
	if (ioctl(pc->uffd, UFFDIO_COPY, &copy) && (errno != EEXIST || region->page_size != PAGE_BYTES))
		return false;
	exit_ring_note_resident(&pc->ring, offset >> EXIT_RING_PAGE_SHIFT, region->page_size >> EXIT_RING_PAGE_SHIFT);
	return true;
}

void local_install(struct postcopy *pc, struct vcpu_side *vcpu)
{
	uint32_t left = 0;

	if (!pc->image)
		return;
	if (exit_lane_enter(&vcpu->lane)) {
		for (uint32_t i = 0; i < vcpu->want_count; i++) {
			/* None of the pages is another region's: adapt.c and wait.c name only what is registered. */
			if (!install(pc, vcpu->want[i]))
				vcpu->want[left++] = vcpu->want[i];
		}
		vcpu->want_count = left;
	}
	if (exit_lane_leave(&vcpu->lane))
		ring_doorbell(pc);
}
