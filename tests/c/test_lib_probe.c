// sources: ../libpostcopy/probe.c ../libpostcopy/probe_kvm.c
#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>

#include "../../daemon/libpostcopy/kvm_abi.h"
#include "../../daemon/libpostcopy/libpostcopy.h"
#include "check.h"

/* Kernels that are not here, played from the interface's documentation: what a vCPU does with the page at 0. */
enum kernel {
	STOCK,		 /* no flag; a userfaultfd for user mode only makes KVM's access fail */
	STOCK_EMULATES,	 /* the same where real mode is emulated */
	STOCK_NO_UFFD,	 /* no userfaultfd to be had */
	EXIT_ON_MISSING,
	USERFAULT,
	PRETENDER,	 /* advertises and accepts everything, and then runs on */
	STUCK,		 /* exits annotated for ever, bitmap or not */
	NO_KVM,
};

enum { KVM_FD = 100, VM_FD, VCPU_FD, UFFD_FD };

static struct {
	enum kernel kernel;
	struct kvm_run run;
	struct memslot2 slot;
	bool has_slot, installed;
	int open; /* descriptors and mappings not given back */
} fake;

static int fail(int error)
{
	errno = error;
	return -1;
}

static int annotated(void)
{
	const uint64_t fault[] = { 0, 0, 4096 };

	fake.run.exit_reason = 39;
	memcpy(fake.run.padding, fault, sizeof(fault));
	return fail(EFAULT);
}

static int halt(void)
{
	fake.run.exit_reason = KVM_EXIT_HLT;
	return 0;
}

static bool page_is_there(void)
{
	return fake.installed || *(const uint8_t *)(uintptr_t)fake.slot.userspace_addr;
}

static int run_vcpu(void)
{
	const uint64_t *bitmap = (const uint64_t *)(uintptr_t)fake.slot.userfault_bitmap;

	CHECK(fake.has_slot);
	switch (fake.kernel) {
	case USERFAULT:
		if (bitmap && *bitmap & 1)
			return annotated();
		break;
	case EXIT_ON_MISSING:
		if (fake.slot.flags && !page_is_there())
			return annotated();
		break;
	case STUCK:
		return annotated();
	case STOCK_EMULATES:
		if (!page_is_there()) {
			fake.run.exit_reason = KVM_EXIT_INTERNAL_ERROR;
			return 0;
		}
		break;
	case PRETENDER:
		break;
	default:
		if (!page_is_there()) {
			fake.run.exit_reason = KVM_EXIT_UNKNOWN;
			return fail(EFAULT);
		}
	}
	return halt();
}

static int set_slot(uintptr_t arg)
{
	if (fake.kernel <= STOCK_NO_UFFD)
		return fail(EINVAL);
	memcpy(&fake.slot, (const void *)arg, sizeof(fake.slot));
	CHECK_EQ(fake.slot.flags, 8);
	fake.has_slot = true;
	return 0;
}

static int fake_ioctl(void *context, int fd, unsigned long request, uintptr_t arg)
{
	(void)context;
	switch (request) {
	case KVM_CHECK_EXTENSION:
		return fd == KVM_FD && fake.kernel >= EXIT_ON_MISSING;
	case KVM_CREATE_VM:
		fake.open++;
		fake.has_slot = fake.installed = false;
		return VM_FD;
	case KVM_CREATE_VCPU:
		fake.open++;
		return VCPU_FD;
	case KVM_GET_VCPU_MMAP_SIZE:
		return sizeof(struct kvm_run);
	case SET_MEMSLOT2:
		return set_slot(arg);
	case KVM_SET_USER_MEMORY_REGION:
		memset(&fake.slot, 0, sizeof(fake.slot));
		fake.slot.userspace_addr = ((const struct kvm_userspace_memory_region *)arg)->userspace_addr;
		fake.has_slot = true;
		return 0;
	case UFFDIO_COPY:
		fake.installed = true;
		return 0;
	case KVM_RUN:
		return run_vcpu();
	default:
		return 0;
	}
}

static int fake_open_kvm(void *context)
{
	(void)context;
	if (fake.kernel == NO_KVM)
		return fail(ENOENT);
	fake.open++;
	return KVM_FD;
}

static void *fake_map(void *context, int fd, size_t len)
{
	(void)context;
	CHECK_EQ(fd, VCPU_FD);
	CHECK_EQ(len, sizeof(struct kvm_run));
	fake.open++;
	return &fake.run;
}

static void fake_unmap(void *context, void *mem, size_t len)
{
	(void)context;
	(void)mem;
	(void)len;
	fake.open--;
}

static void fake_close(void *context, int fd)
{
	(void)context;
	CHECK(fd >= KVM_FD);
	fake.open--;
}

static int fake_open_userfaultfd(void *context)
{
	(void)context;
	if (fake.kernel == STOCK_NO_UFFD)
		return fail(EPERM);
	fake.open++;
	return UFFD_FD;
}

static const struct postcopy_kvm_ops ops = {
	.open_kvm = fake_open_kvm,
	.ioctl = fake_ioctl,
	.map = fake_map,
	.unmap = fake_unmap,
	.close = fake_close,
	.open_userfaultfd = fake_open_userfaultfd,
};

static void a_kernel_is_what_it_does(void)
{
	static const struct {
		enum kernel kernel;
		enum postcopy_method method;
		int error;
	} expected[] = {
		{ STOCK, POSTCOPY_METHOD_USER_MODE_ONLY, 0 },
		{ STOCK_EMULATES, POSTCOPY_METHOD_USER_MODE_ONLY, 0 },
		{ STOCK_NO_UFFD, POSTCOPY_METHOD_NONE, EPERM },
		{ EXIT_ON_MISSING, POSTCOPY_METHOD_EXIT_ON_MISSING, 0 },
		{ USERFAULT, POSTCOPY_METHOD_USERFAULT, 0 },
		{ PRETENDER, POSTCOPY_METHOD_NONE, 0 },
		{ STUCK, POSTCOPY_METHOD_NONE, 0 },
		{ NO_KVM, POSTCOPY_METHOD_NONE, ENOENT },
	};

	for (size_t i = 0; i < sizeof(expected) / sizeof(expected[0]); i++) {
		struct postcopy_probe_result result;

		memset(&fake, 0, sizeof(fake));
		fake.kernel = expected[i].kernel;
		postcopy_probe(&ops, &result);
		CHECK_EQ(result.method, expected[i].method);
		if (expected[i].error)
			CHECK_EQ(result.error, expected[i].error);
		CHECK_EQ(result.claims_userfault, fake.kernel >= EXIT_ON_MISSING && fake.kernel != NO_KVM);
		CHECK_EQ(fake.open, 0);
	}
}

static void clearing_touches_the_named_bits_alone(void)
{
	uint64_t bitmap[4];

	for (uint64_t first = 0; first < 200; first += 13) {
		for (uint64_t count = 0; first + count <= 256; count += 17) {
			memset(bitmap, 0xff, sizeof(bitmap));
			postcopy_userfault_clear(bitmap, first, count);
			for (uint64_t page = 0; page < 256; page++)
				CHECK_EQ(bitmap[page / 64] >> page % 64 & 1, page < first || page >= first + count);
		}
	}
}

int main(void)
{
	a_kernel_is_what_it_does();
	clearing_touches_the_named_bits_alone();
	return 0;
}
