/*
 * The guest on KVM vCPUs: x86-64 long mode at CPL 3, no interrupts, no devices, no stack.
 *
 * Slot 0 holds all the guest needs besides its memory and is the same in every machine of one shape: page tables,
 * code, progress words. It is never migrated and always present, because under shadow paging KVM reads page tables (and,
 * for `out` at CPL 3, the TSS at address 0) with accesses that must not meet an absent page.
 *
 *   0x000000 empty (TSS)       0x003000 page directory of the first 2 MiB
 *   0x001000 PML4              0x004000 code
 *   0x002000 PDPT              0x005000 progress words, one a vCPU, 64 bytes apart
 *                              0x010000 page directories of memory, one a GiB
 *
 * Memory is slot 1, contiguous from VMM_MEMORY_GPA, mapped one to one.
 */
#define _GNU_SOURCE
#include "vmm_machine.h"

#include <errno.h>

#if defined(__x86_64__)

#include <fcntl.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vmm_exits.h"
#include "vmm_guest.h"

#define BOOT_BYTES VMM_BOOT_BYTES
#define BOOT_PML4 0x1000u
#define BOOT_PDPT 0x2000u
#define BOOT_PD 0x3000u
#define BOOT_CODE 0x4000u
#define BOOT_PROGRESS 0x5000u
#define BOOT_MEMORY_PDS 0x10000u
#define PROGRESS_STRIDE 64u

_Static_assert(BOOT_PROGRESS + VMM_MAX_VCPUS * PROGRESS_STRIDE <= BOOT_MEMORY_PDS, "progress words fit");
_Static_assert(BOOT_MEMORY_PDS + (VMM_MAX_MEMORY >> 30) * 4096 <= BOOT_BYTES, "page directories fit");

/* Present, writable, user, accessed, dirty: the last two so that KVM never has to write these tables. */
#define PTE 0x67u
#define PTE_LARGE 0xe7u

/* Unused by this guest, but required on Intel; between the boot slot and memory. */
#define TSS_GPA 0xfffbd000u

#define MAX_CPUID_ENTRIES 256

/* The guest uses no x87, SSE or debug registers beyond reset state; the FPU is carried so that this need not be trusted. */
struct kvm_state {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_fpu fpu;
};

static void fill_boot(struct vmm *vm)
{
	uint64_t *pml4 = (uint64_t *)(vm->boot + BOOT_PML4);
	uint64_t *pdpt = (uint64_t *)(vm->boot + BOOT_PDPT);
	uint64_t *pd = (uint64_t *)(vm->boot + BOOT_PD);
	uint64_t gib = (vm->shape.memory_bytes + (1u << 30) - 1) >> 30;

	pml4[0] = BOOT_PDPT | PTE;
	pdpt[0] = BOOT_PD | PTE;
	pd[0] = PTE_LARGE;
	for (uint64_t g = 0; g < gib; g++) {
		uint64_t at = BOOT_MEMORY_PDS + g * 4096;

		pdpt[(VMM_MEMORY_GPA >> 30) + g] = at | PTE;
		pd = (uint64_t *)(vm->boot + at);
		for (uint64_t i = 0; i < 512; i++)
			pd[i] = (VMM_MEMORY_GPA + (g << 30) + (i << 21)) | PTE_LARGE;
	}
	memcpy(vm->boot + BOOT_CODE, guest_code, guest_code_bytes());
}

static uint64_t *progress_word(const struct vcpu *vcpu)
{
	return (uint64_t *)(vcpu->vm->boot + BOOT_PROGRESS + vcpu->index * PROGRESS_STRIDE);
}

static int add_slot(struct vmm *vm, uint32_t slot, uint64_t gpa, uint8_t *memory, uint64_t len_bytes)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.guest_phys_addr = gpa,
		.memory_size = len_bytes,
		.userspace_addr = (uint64_t)memory,
	};

	return ioctl(vm->vm_fd, KVM_SET_USER_MEMORY_REGION, &region) ? -errno : 0;
}

/* The host's CPUID, for without long mode in it EFER cannot be set. */
static int set_cpuid(struct vcpu *vcpu)
{
	size_t len_bytes = sizeof(struct kvm_cpuid2) + MAX_CPUID_ENTRIES * sizeof(struct kvm_cpuid_entry2);
	struct kvm_cpuid2 *cpuid = calloc(1, len_bytes);
	int error = 0;

	if (!cpuid)
		return -ENOMEM;
	cpuid->nent = MAX_CPUID_ENTRIES;
	if (ioctl(vcpu->vm->kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid) || ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid))
		error = -errno;
	free(cpuid);
	return error;
}

/* Long mode, flat segments, CPL 3. CR4 has PAE and OSFXSR; not PCIDE, which nested hosts refuse. */
static int set_special_registers(struct vcpu *vcpu)
{
	struct kvm_segment code = {
		.limit = 0xffffffff, .selector = 0x33, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1,
	};
	struct kvm_segment data = {
		.limit = 0xffffffff, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .db = 1, .s = 1, .g = 1,
	};
	struct kvm_sregs sregs;

	if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs))
		return -errno;
	sregs.cr0 = 0x80050033; /* PG AM WP NE ET MP PE */
	sregs.cr3 = BOOT_PML4;
	sregs.cr4 = 0x220;
	sregs.efer = 0xd01; /* NXE LMA LME SCE */
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	return ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) ? -errno : 0;
}

/* The register plan of vmm_guest.c. RFLAGS has IOPL 3, so that `out` is allowed at CPL 3. */
static int set_registers(struct vcpu *vcpu)
{
	const struct walk_slice *slice = &vcpu->slice;
	struct kvm_regs regs = {
		.rip = BOOT_CODE,
		.rflags = 0x3002,
		.r8 = 0,
		.r9 = slice->mask,
		.r10 = walk_limit(&vcpu->vm->shape, slice),
		.r11 = slice->pages,
		.r12 = slice->first,
		.r13 = VMM_MEMORY_GPA + slice->first * VMM_PAGE,
		.r14 = BOOT_PROGRESS + vcpu->index * PROGRESS_STRIDE,
		.r15 = slice->multiplier,
		.rbx = vcpu->vm->shape.seed,
		.rbp = slice->shift | slice->bits << 8,
	};

	return ioctl(vcpu->fd, KVM_SET_REGS, &regs) ? -errno : 0;
}

static int vcpu_init(struct vcpu *vcpu, const char **op)
{
	int error;
	void *run;

	*op = "KVM_CREATE_VCPU";
	vcpu->fd = ioctl(vcpu->vm->vm_fd, KVM_CREATE_VCPU, (unsigned long)vcpu->index);
	if (vcpu->fd < 0)
		return -errno;
	*op = "mmap of kvm_run";
	run = mmap(NULL, vcpu->vm->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (run == MAP_FAILED)
		return -errno;
	vcpu->run = run;
	*op = "KVM_SET_CPUID2";
	error = set_cpuid(vcpu);
	if (error)
		return error;
	*op = "KVM_SET_SREGS";
	error = set_special_registers(vcpu);
	if (error)
		return error;
	*op = "KVM_SET_REGS";
	return set_registers(vcpu);
}

static int open_kvm(struct vmm *vm, const char **op)
{
	int run_bytes;

	*op = "open of /dev/kvm";
	vm->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (vm->kvm_fd < 0)
		return -errno;
	*op = "KVM_CREATE_VM";
	vm->vm_fd = ioctl(vm->kvm_fd, KVM_CREATE_VM, 0ul);
	if (vm->vm_fd < 0)
		return -errno;
	*op = "KVM_GET_VCPU_MMAP_SIZE";
	run_bytes = ioctl(vm->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0ul);
	if (run_bytes < (int)sizeof(struct kvm_run))
		return run_bytes < 0 ? -errno : -EINVAL;
	vm->run_bytes = (size_t)run_bytes;
	*op = "KVM_SET_TSS_ADDR";
	return ioctl(vm->vm_fd, KVM_SET_TSS_ADDR, (unsigned long)TSS_GPA) ? -errno : 0;
}

static int kvm_init(struct vmm *vm, const char **op)
{
	int error = open_kvm(vm, op);
	void *boot;

	if (error)
		return error;
	*op = "mmap of the boot slot";
	boot = mmap(NULL, BOOT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (boot == MAP_FAILED)
		return -errno;
	vm->boot = boot;
	fill_boot(vm);
	*op = "KVM_SET_USER_MEMORY_REGION";
	error = add_slot(vm, 0, 0, vm->boot, BOOT_BYTES);
	if (!error)
		error = add_slot(vm, 1, VMM_MEMORY_GPA, vm->memory, vm->shape.memory_bytes);
	for (unsigned i = 0; i < vm->shape.vcpus && !error; i++)
		error = vcpu_init(&vm->vcpus[i], op);
	return error;
}

static void kvm_deinit(struct vmm *vm)
{
	exits_deinit(vm);
	for (unsigned i = 0; i < vm->shape.vcpus; i++) {
		if (vm->vcpus[i].run)
			munmap(vm->vcpus[i].run, vm->run_bytes);
		if (vm->vcpus[i].fd >= 0)
			close(vm->vcpus[i].fd);
	}
	if (vm->vm_fd >= 0)
		close(vm->vm_fd);
	if (vm->kvm_fd >= 0)
		close(vm->kvm_fd);
	if (vm->boot)
		munmap(vm->boot, BOOT_BYTES);
}

static void kvm_release(struct vcpu *vcpu)
{
	__atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_RELEASE);
}

/* Before the kick: a KVM_RUN that the signal came too early for then returns at once. */
static void kvm_interrupt(struct vcpu *vcpu)
{
	__atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_RELEASE);
	if (vcpu->vm->exits)
		exits_interrupt(vcpu);
}

static enum outcome fail(struct vcpu *vcpu, int run_errno)
{
	struct kvm_regs regs = {0};

	/* exit_reason is stale where KVM_RUN failed otherwise than by a memory fault. */
	bool has_reason = run_errno == 0 || run_errno == EFAULT || run_errno == EHWPOISON;

	vcpu->run_errno = run_errno;
	vcpu->exit_reason = has_reason ? vcpu->run->exit_reason : KVM_EXIT_UNKNOWN;
	vcpu->suberror = vcpu->exit_reason == KVM_EXIT_INTERNAL_ERROR ? vcpu->run->internal.suberror : 0;
	if (ioctl(vcpu->fd, KVM_GET_REGS, &regs) == 0)
		vcpu->rip = regs.rip;
	return OUTCOME_FAILED;
}

/* The `out` itself is completed by the next KVM_RUN; registers must not be saved before. */
static enum outcome finish(struct vcpu *vcpu)
{
	kvm_interrupt(vcpu);
	if (ioctl(vcpu->fd, KVM_RUN, 0) == 0 || errno != EINTR)
		return fail(vcpu, errno);
	return OUTCOME_DONE;
}

static enum outcome react_to_port(struct vcpu *vcpu)
{
	struct kvm_regs regs;
	uint16_t port = vcpu->run->io.port;

	switch (port) {
	case GUEST_PORT_DONE:
		return finish(vcpu);
	case GUEST_PORT_WRONG_ID:
	case GUEST_PORT_WRONG_COUNTER:
		if (ioctl(vcpu->fd, KVM_GET_REGS, &regs))
			return fail(vcpu, errno);
		vcpu_guest_error(vcpu, regs.rdi,
				 port == GUEST_PORT_WRONG_ID ? VMM_WRONG_ID : VMM_WRONG_COUNTER);
		return OUTCOME_AGAIN;
	default:
		return fail(vcpu, 0);
	}
}

/* What to do after KVM_RUN answered: the one place that knows its outcomes. */
static enum outcome react(struct vcpu *vcpu, int answer, int run_errno)
{
	if (vcpu->vm->exits) {
		bool handled;
		enum outcome outcome = exits_react(vcpu, answer, run_errno, &handled);

		if (outcome == OUTCOME_FAILED)
			return fail(vcpu, run_errno);
		if (handled)
			return outcome;
	}
	if (answer < 0) {
		if (run_errno == EAGAIN)
			return OUTCOME_AGAIN;
		if (run_errno == EINTR)
			/* Only this return leaves no half-done instruction behind, so only here a vCPU parks. */
			return vcpu_must_stop(vcpu) ? OUTCOME_PARK : OUTCOME_AGAIN;
		return fail(vcpu, run_errno);
	}
	switch (vcpu->run->exit_reason) {
	case KVM_EXIT_IO:
		return react_to_port(vcpu);
	case KVM_EXIT_INTR:
		return OUTCOME_AGAIN;
	default:
		return fail(vcpu, 0);
	}
}

static enum outcome kvm_run_guest(struct vcpu *vcpu)
{
	enum outcome outcome = vcpu->vm->exits ? exits_settle(vcpu) : OUTCOME_AGAIN;

	if (outcome == OUTCOME_FAILED)
		return fail(vcpu, 0);
	while (outcome == OUTCOME_AGAIN) {
		int answer = ioctl(vcpu->fd, KVM_RUN, 0);

		outcome = react(vcpu, answer, errno);
	}
	return outcome;
}

static uint64_t kvm_progress(const struct vcpu *vcpu)
{
	return __atomic_load_n(progress_word(vcpu), __ATOMIC_RELAXED);
}

static int kvm_save(struct vcpu *vcpu, uint8_t *out)
{
	struct kvm_state state;

	memset(&state, 0, sizeof(state));
	if (ioctl(vcpu->fd, KVM_GET_REGS, &state.regs) || ioctl(vcpu->fd, KVM_GET_SREGS, &state.sregs) ||
	    ioctl(vcpu->fd, KVM_GET_FPU, &state.fpu))
		return -errno;
	memcpy(out, &state, sizeof(state));
	return 0;
}

static int kvm_load(struct vcpu *vcpu, const uint8_t *in)
{
	struct kvm_state state;

	memcpy(&state, in, sizeof(state));
	if (ioctl(vcpu->fd, KVM_SET_SREGS, &state.sregs) || ioctl(vcpu->fd, KVM_SET_FPU, &state.fpu) ||
	    ioctl(vcpu->fd, KVM_SET_REGS, &state.regs))
		return -errno;
	__atomic_store_n(progress_word(vcpu), state.regs.r8, __ATOMIC_RELAXED);
	return 0;
}

static void kvm_state_walk(const uint8_t *in, struct vmm_walk *walk)
{
	struct kvm_state state;

	memcpy(&state, in, sizeof(state));
	walk->tick = state.regs.r8;
	walk->visited = guest_has_visited(state.regs.rip - BOOT_CODE);
}

/* FNV-1a of the code. */
static uint64_t kvm_program_id(void)
{
	uint64_t id = 0xcbf29ce484222325u;

	for (size_t i = 0; i < guest_code_bytes(); i++)
		id = (id ^ guest_code[i]) * 0x100000001b3u;
	return id;
}

const struct engine vmm_kvm_engine = {
	.init = kvm_init,
	.deinit = kvm_deinit,
	.run = kvm_run_guest,
	.release = kvm_release,
	.interrupt = kvm_interrupt,
	.progress = kvm_progress,
	.state_bytes = sizeof(struct kvm_state),
	.save = kvm_save,
	.load = kvm_load,
	.state_walk = kvm_state_walk,
	.program_id = kvm_program_id,
};

#else

static int kvm_init(struct vmm *vm, const char **op)
{
	(void)vm;
	*op = "the guest's machine code, which is x86-64,";
	return -ENOSYS;
}

static void kvm_deinit(struct vmm *vm)
{
	exits_deinit(vm);
	(void)vm;
}

static void kvm_state_walk(const uint8_t *state, struct vmm_walk *walk)
{
	(void)state;
	*walk = (struct vmm_walk){0};
}

static uint64_t kvm_program_id(void)
{
	return 1;
}

/* init fails, so that no other function is ever called. */
const struct engine vmm_kvm_engine = {
	.init = kvm_init,
	.deinit = kvm_deinit,
	.state_walk = kvm_state_walk,
	.program_id = kvm_program_id,
};

#endif
