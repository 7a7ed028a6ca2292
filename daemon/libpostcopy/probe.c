/* postcopy_probe: whether absent pages can be made to exit, found out with a VM of one page.
 *
 * Capability numbers of the out-of-tree series moved from version to version, and one of them means something else upstream
 * (236 is KVM_CAP_PRE_FAULT_MEMORY): what is advertised is only reported. What counts is what a vCPU does.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "kvm_abi.h"
#include "libpostcopy.h"
#include "probe_kvm.h"

#define PAGE_BYTES 4096ull
#define HLT 0xf4
#define COUNT_OF(array) (sizeof(array) / sizeof((array)[0]))

static const int userfault_numbers[] = { 236, 239, 243, 245 };
static const int exit_on_missing_numbers[] = { 234, 236 };

/* A VM with one vCPU that executes the page at guest physical address 0. */
struct trial {
	const struct postcopy_kvm_ops *ops;
	int kvm, vm, vcpu;
	size_t run_bytes;
	struct kvm_run *run;
	uint8_t *page;
	uint64_t bitmap;
};

static int call(const struct trial *trial, int fd, unsigned long request, void *arg)
{
	return trial->ops->ioctl(trial->ops->context, fd, request, (uintptr_t)arg);
}

static int call_number(const struct trial *trial, int fd, unsigned long request, uintptr_t arg)
{
	return trial->ops->ioctl(trial->ops->context, fd, request, arg);
}

static void trial_end(struct trial *trial)
{
	const struct postcopy_kvm_ops *ops = trial->ops;

	if (trial->run)
		ops->unmap(ops->context, trial->run, trial->run_bytes);
	if (trial->vcpu >= 0)
		ops->close(ops->context, trial->vcpu);
	if (trial->vm >= 0)
		ops->close(ops->context, trial->vm);
	if (trial->page != MAP_FAILED)
		munmap(trial->page, PAGE_BYTES);
}

/* A new VM without memory. False: errno says why. */
static bool trial_begin(struct trial *trial, const struct postcopy_kvm_ops *ops, int kvm)
{
	int run_bytes;

	*trial = (struct trial){ .ops = ops, .kvm = kvm, .vm = -1, .vcpu = -1 };
	trial->page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (trial->page == MAP_FAILED)
		return false;
	trial->vm = call_number(trial, kvm, KVM_CREATE_VM, 0);
	if (trial->vm < 0)
		return false;
	trial->vcpu = call_number(trial, trial->vm, KVM_CREATE_VCPU, 0);
	run_bytes = call_number(trial, kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (trial->vcpu < 0 || run_bytes < (int)sizeof(struct kvm_run))
		return false;
	trial->run_bytes = (size_t)run_bytes;
	trial->run = ops->map(ops->context, trial->vcpu, trial->run_bytes);
	return trial->run != NULL;
}

/* Real mode at 0:0, where the page is. */
static bool place_vcpu(const struct trial *trial)
{
	struct kvm_regs regs = { .rflags = 2 };
	struct kvm_sregs sregs = { 0 };

	if (call(trial, trial->vcpu, KVM_GET_SREGS, &sregs))
		return false;
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	return !call(trial, trial->vcpu, KVM_SET_SREGS, &sregs) && !call(trial, trial->vcpu, KVM_SET_REGS, &regs);
}

static bool set_memory(struct trial *trial, uint32_t flags)
{
	struct memslot2 slot = {
		.flags = flags,
		.memory_size = PAGE_BYTES,
		.userspace_addr = (uintptr_t)trial->page,
		.userfault_bitmap = flags ? (uintptr_t)&trial->bitmap : 0,
	};
	struct kvm_userspace_memory_region old = { .memory_size = PAGE_BYTES, .userspace_addr = slot.userspace_addr };

	if (flags)
		return !call(trial, trial->vm, SET_MEMSLOT2, &slot);
	return !call(trial, trial->vm, KVM_SET_USER_MEMORY_REGION, &old);
}

/* Whether running gives an annotated exit for the page. Running always ends: what is there is HLT or, without a page, zeros
 * ("add [bx+si], al") up to the end of memory. */
static bool exits_annotated(const struct trial *trial)
{
	struct memory_fault fault;

	errno = 0;
	if (call_number(trial, trial->vcpu, KVM_RUN, 0) >= 0 || (errno != EFAULT && errno != EHWPOISON) ||
	    trial->run->exit_reason != KVM_EXIT_MEMORY_FAULT_NUMBER)
		return false;
	fault = memory_fault_of(trial->run);
	return fault.gpa < PAGE_BYTES;
}

/* Userfault: a page that is there exits as long as its bit is set, and runs when it is cleared. */
static bool try_userfault(const struct postcopy_kvm_ops *ops, int kvm)
{
	struct trial trial;
	bool proved = false;

	if (trial_begin(&trial, ops, kvm)) {
		trial.page[0] = HLT;
		trial.bitmap = 1;
		if (set_memory(&trial, MEMSLOT_FLAG_EXIT) && place_vcpu(&trial) && exits_annotated(&trial)) {
			postcopy_userfault_clear(&trial.bitmap, 0, 1);
			proved = call_number(&trial, trial.vcpu, KVM_RUN, 0) == 0 && trial.run->exit_reason == KVM_EXIT_HLT;
		}
	}
	trial_end(&trial);
	return proved;
}

/* Exit on missing: a page that is not there exits, and runs when it is. */
static bool try_exit_on_missing(const struct postcopy_kvm_ops *ops, int kvm)
{
	struct trial trial;
	bool proved = false;

	if (trial_begin(&trial, ops, kvm) && set_memory(&trial, MEMSLOT_FLAG_EXIT) && place_vcpu(&trial) &&
	    exits_annotated(&trial)) {
		trial.page[0] = HLT;
		proved = call_number(&trial, trial.vcpu, KVM_RUN, 0) == 0 && trial.run->exit_reason == KVM_EXIT_HLT;
	}
	trial_end(&trial);
	return proved;
}

static bool register_page(const struct trial *trial, int uffd)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = {
		.range = { .start = (uintptr_t)trial->page, .len = PAGE_BYTES },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	return !call(trial, uffd, UFFDIO_API, &api) && !call(trial, uffd, UFFDIO_REGISTER, &range);
}

/* User mode only: KVM's own access to a page that is not there fails instead of waiting, and succeeds when it is. Where real
 * mode is emulated the failure is the emulator's, elsewhere EFAULT: both are exits. */
static bool try_user_mode_only(const struct postcopy_kvm_ops *ops, int kvm)
{
	struct uffdio_copy copy = { .len = PAGE_BYTES };
	uint8_t content[PAGE_BYTES] __attribute__((aligned(4096))) = { HLT };
	int uffd = ops->open_userfaultfd(ops->context);
	struct trial trial;
	bool proved = false;

	if (uffd < 0)
		return false;
	if (trial_begin(&trial, ops, kvm) && register_page(&trial, uffd) && set_memory(&trial, 0) && place_vcpu(&trial)) {
		int ret = call_number(&trial, trial.vcpu, KVM_RUN, 0);
		bool failed = ret < 0 ? errno == EFAULT : trial.run->exit_reason == KVM_EXIT_INTERNAL_ERROR;

		copy.dst = (uintptr_t)trial.page;
		copy.src = (uintptr_t)content;
		proved = failed && !call(&trial, uffd, UFFDIO_COPY, &copy) &&
			 call_number(&trial, trial.vcpu, KVM_RUN, 0) == 0 && trial.run->exit_reason == KVM_EXIT_HLT;
	}
	trial_end(&trial);
	ops->close(ops->context, uffd);
	return proved;
}

static bool claims(const struct postcopy_kvm_ops *ops, int kvm, const int *numbers, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		if (ops->ioctl(ops->context, kvm, KVM_CHECK_EXTENSION, (uintptr_t)numbers[i]) > 0)
			return true;
	}
	return false;
}

static enum postcopy_method best_method(const struct postcopy_kvm_ops *ops, int kvm)
{
	if (try_userfault(ops, kvm))
		return POSTCOPY_METHOD_USERFAULT;
	if (try_exit_on_missing(ops, kvm))
		return POSTCOPY_METHOD_EXIT_ON_MISSING;
	/* Of all the errors, that of the last resort is the one to report. */
	errno = 0;
	return try_user_mode_only(ops, kvm) ? POSTCOPY_METHOD_USER_MODE_ONLY : POSTCOPY_METHOD_NONE;
}

void postcopy_probe(const struct postcopy_kvm_ops *ops, struct postcopy_probe_result *result)
{
	int kvm;

	*result = (struct postcopy_probe_result){ .method = POSTCOPY_METHOD_NONE };
	if (!ops)
		ops = &probe_real_kvm;
	kvm = ops->open_kvm(ops->context);
	if (kvm < 0) {
		result->error = errno;
		return;
	}
	result->claims_userfault = claims(ops, kvm, userfault_numbers, COUNT_OF(userfault_numbers));
	result->claims_exit_on_missing = claims(ops, kvm, exit_on_missing_numbers, COUNT_OF(exit_on_missing_numbers));
	result->method = best_method(ops, kvm);
	result->error = result->method == POSTCOPY_METHOD_NONE ? errno : 0;
	ops->close(ops->context, kvm);
}

void postcopy_userfault_clear(uint64_t *bitmap, uint64_t first_page, uint64_t count)
{
	for (uint64_t page = first_page; page < first_page + count;) {
		uint64_t in_word = 64 - page % 64, left = first_page + count - page, run = left < in_word ? left : in_word;
		uint64_t bits = (run == 64 ? ~0ull : (1ull << run) - 1) << page % 64;

		/* Release: the kernel that finds a bit clear finds the page populated. */
		__atomic_fetch_and(&bitmap[page / 64], ~bits, __ATOMIC_RELEASE);
		page += run;
	}
}
