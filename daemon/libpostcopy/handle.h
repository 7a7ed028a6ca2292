/* What the library's files share: the handle and one vCPU's part of it. */
#ifndef LIBPOSTCOPY_HANDLE_H
#define LIBPOSTCOPY_HANDLE_H

#include <capstone/capstone.h>
#include <stdalign.h>

#include "../native/exit_ring_vmm.h"
#include "guard.h"
#include "libpostcopy.h"

_Static_assert(POSTCOPY_PAGES_MAX == EXIT_RING_ENTRIES, "an answer is a batch");

#define PAGE_BYTES 4096ull

struct vcpu_side {
	/* Two lines apart: vCPUs share nothing. */
	alignas(128) struct exit_lane_end lane;
	uint32_t kicked; /* set by any thread */
	uint32_t want_count;
	uint32_t want_flags;
	uint64_t want[POSTCOPY_PAGES_MAX];
	struct guard guard;
	csh decoder; /* 0: not opened yet */
	cs_insn *insn;
};

struct postcopy {
	char *path;
	uint32_t timeout_ms;
	int uffd;
	int ring_fd;
	int doorbell;
	int stop_fd;
	int image_fd; /* -1: the image is not at hand */
	const uint8_t *image;
	size_t image_len;
	int socket; /* -1: not connected */
	uint8_t *frame; /* the hand-off message */
	size_t frame_len;

	struct postcopy_region *region; /* by gpa */
	size_t regions;
	struct postcopy_range *pinned;
	size_t pinned_count;
	const void *(*other_memory)(void *context, uint64_t gpa, size_t len);
	void *context;

	struct exit_ring_end ring;
	size_t ring_len;
	struct vcpu_side *vcpu;

	/* How far postcopy_populate got. */
	size_t populate_range;
	uint64_t populate_offset;
};

#endif
