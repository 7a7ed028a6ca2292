/* The guest's page tables, walked from user mode.
 *
 * KVM_TRANSLATE would do it in the kernel, but there a table that is absent looks like an address that is not mapped; here
 * it is a page to wait for. It is used only for tables that the library cannot read.
 *
 * Source: Intel SDM volume 3, chapter 4 "Paging"; AMD64 APM volume 2, chapter 5.
 */
#ifndef LIBPOSTCOPY_WALK_H
#define LIBPOSTCOPY_WALK_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct guest_view {
	void *context;
	bool (*is_missing)(void *context, uint64_t gpa);
	/* NULL: not readable here. */
	const void *(*bytes)(void *context, uint64_t gpa, size_t len);
	/* The kernel's opinion. False: not mapped, or cannot say. */
	bool (*translate)(void *context, uint64_t linear, uint64_t *gpa);
};

enum walk_result {
	WALK_MAPPED,	/* *gpa is where the address leads */
	WALK_UNMAPPED,	/* the guest will get a page fault of its own */
	WALK_NEEDS_PAGE /* *gpa is of a page table that is missing */
};

enum walk_result walk_linear(const struct guest_view *view, const struct kvm_sregs *sregs, uint64_t linear,
			     uint64_t *gpa);

#endif
