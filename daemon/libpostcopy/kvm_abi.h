/* What of KVM's interface the system's header may lack.
 *
 * Source: Documentation/virt/kvm/api.rst, "KVM_EXIT_MEMORY_FAULT" (6.8); out-of-tree flags from the "KVM Userfault" series.
 */
#ifndef LIBPOSTCOPY_KVM_ABI_H
#define LIBPOSTCOPY_KVM_ABI_H

#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define KVM_EXIT_MEMORY_FAULT_NUMBER 39u

#define MEMORY_FAULT_READ (1ull << 0)
#define MEMORY_FAULT_WRITE (1ull << 1)
#define MEMORY_FAULT_EXEC (1ull << 2)
#define MEMORY_FAULT_PRIVATE (1ull << 3)
#define MEMORY_FAULT_USERFAULT (1ull << 4)

struct memory_fault {
	uint64_t flags;
	uint64_t gpa;
	uint64_t size;
};

/* The exits' union; its offset is the same in every version of struct kvm_run. */
#define KVM_RUN_EXIT_OFFSET offsetof(struct kvm_run, hw)
_Static_assert(KVM_RUN_EXIT_OFFSET == 32, "struct kvm_run: memory_fault lies at 32");

static inline struct memory_fault memory_fault_of(const void *run)
{
	struct memory_fault fault;

	memcpy(&fault, (const char *)run + KVM_RUN_EXIT_OFFSET, sizeof(fault));
	return fault;
}

/* Both series use this bit, one after the other: KVM_MEM_EXIT_ON_MISSING, KVM_MEM_USERFAULT. */
#define MEMSLOT_FLAG_EXIT (1u << 3)

struct memslot2 {
	uint32_t slot;
	uint32_t flags;
	uint64_t guest_phys_addr;
	uint64_t memory_size;
	uint64_t userspace_addr;
	uint64_t guest_memfd_offset;
	uint32_t guest_memfd;
	uint32_t pad1;
	uint64_t userfault_bitmap;
	uint64_t pad2[13];
};
_Static_assert(sizeof(struct memslot2) == 160, "struct kvm_userspace_memory_region2");
_Static_assert(offsetof(struct memslot2, userfault_bitmap) == 48, "struct kvm_userspace_memory_region2");

#define SET_MEMSLOT2 _IOW(KVMIO, 0x49, struct memslot2)
_Static_assert(SET_MEMSLOT2 == 0x40a0ae49, "KVM_SET_USER_MEMORY_REGION2");

#endif
