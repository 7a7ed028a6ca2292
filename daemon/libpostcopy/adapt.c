/* postcopy_adapt: what an exit of KVM_RUN means. */
#include <errno.h>
#include <linux/kvm.h>
#include <string.h>

#include "kvm_abi.h"
#include "memory.h"
#include "mmio.h"
#include "resolve.h"

static enum postcopy_shape shape_of(const struct postcopy_exit *exit)
{
	const struct kvm_run *run = exit->run;

	if (exit->ret < 0) {
		/* exit_reason is of an earlier exit with every other errno. */
		if (exit->error != EFAULT && exit->error != EHWPOISON)
			return POSTCOPY_SHAPE_NONE;
		if (run->exit_reason == KVM_EXIT_MEMORY_FAULT_NUMBER)
			return POSTCOPY_SHAPE_ANNOTATED;
		return exit->error == EFAULT ? POSTCOPY_SHAPE_BARE : POSTCOPY_SHAPE_NONE;
	}
	if (run->exit_reason == KVM_EXIT_MMIO)
		return POSTCOPY_SHAPE_MMIO;
	if (run->exit_reason == KVM_EXIT_INTERNAL_ERROR && run->internal.suberror == KVM_INTERNAL_ERROR_EMULATION)
		return POSTCOPY_SHAPE_EMULATION;
	return POSTCOPY_SHAPE_NONE;
}

static void answer_error(struct postcopy_answer *answer, enum postcopy_reason reason)
{
	answer->action = POSTCOPY_ERROR;
	answer->reason = reason;
	answer->count = 0;
}

/* What makes one fault the same as another: all registers and all pages. */
static uint64_t fingerprint(const struct postcopy_answer *answer, const struct cpu_state *cpu)
{
	uint64_t hash = guard_hash(GUARD_HASH_START, &answer->shape, sizeof(answer->shape));

	hash = guard_hash(hash, &cpu->regs, sizeof(cpu->regs));
	return guard_hash(hash, answer->gpa, answer->count * sizeof(answer->gpa[0]));
}

/* The pages are known: wait for them, or run again if none is missing, unless that went on for too long. */
static void answer_pages(struct vcpu_side *vcpu, const struct cpu_state *cpu, const struct page_set *set,
			 struct postcopy_answer *answer)
{
	answer->count = set->count;
	memcpy(answer->gpa, set->gpa, set->count * sizeof(set->gpa[0]));
	if (!set->count) {
		answer->action = POSTCOPY_RUN_AGAIN;
		if (!guard_note_unexplained(&vcpu->guard, fingerprint(answer, cpu)))
			answer_error(answer, POSTCOPY_REASON_UNEXPLAINED);
		return;
	}
	answer->action = POSTCOPY_WAIT;
	if (!guard_note(&vcpu->guard, fingerprint(answer, cpu)))
		answer_error(answer, POSTCOPY_REASON_NO_PROGRESS);
}

static void adapt_bare(struct postcopy *pc, struct vcpu_side *vcpu, const struct postcopy_exit *exit,
		       const struct cpu_state *cpu, struct postcopy_answer *answer)
{
	struct page_set set;
	enum postcopy_reason reason = resolve_instruction(pc, vcpu, exit->vcpu_fd, cpu, &set);

	if (reason)
		answer_error(answer, reason);
	else
		answer_pages(vcpu, cpu, &set, answer);
}

static void adapt_emulation(struct postcopy *pc, struct vcpu_side *vcpu, const struct postcopy_exit *exit,
			    const struct cpu_state *cpu, struct postcopy_answer *answer)
{
	struct page_set set;
	enum postcopy_reason reason = resolve_code(pc, vcpu, exit->vcpu_fd, cpu, &set);

	/* With its code in place, what KVM cannot emulate is the VMM's business. */
	if (!reason && set.count)
		answer_pages(vcpu, cpu, &set, answer);
}

static uint32_t access_flags(uint64_t kvm_flags)
{
	uint32_t flags = 0;

	if (kvm_flags & MEMORY_FAULT_READ)
		flags |= EXIT_FAULT_READ;
	if (kvm_flags & MEMORY_FAULT_WRITE)
		flags |= EXIT_FAULT_WRITE;
	if (kvm_flags & MEMORY_FAULT_EXEC)
		flags |= EXIT_FAULT_EXEC;
	return flags;
}

static void adapt_annotated(struct postcopy *pc, struct vcpu_side *vcpu, const struct postcopy_exit *exit,
			    const struct cpu_state *cpu, struct postcopy_answer *answer)
{
	struct memory_fault fault = memory_fault_of(exit->run);
	const struct postcopy_region *region = memory_region(pc, fault.gpa);
	struct page_set set = { 0 };

	/* Not ours: a conversion between private and shared memory, or memory that is not registered. */
	if (!region || fault.flags & MEMORY_FAULT_PRIVATE)
		return;
	for (uint64_t at = memory_page(pc, fault.gpa), end = fault.size ? fault.gpa + fault.size - 1 : fault.gpa;
	     at <= end && at - region->gpa < region->size && set.count < POSTCOPY_PAGES_MAX; at += region->page_size) {
		if (postcopy_is_missing(pc, at))
			page_set_add(&set, at);
	}
	if (!set.count && exit->error == EHWPOISON) {
		answer_error(answer, POSTCOPY_REASON_POISONED);
		return;
	}
	vcpu->want_flags = access_flags(fault.flags);
	answer_pages(vcpu, cpu, &set, answer);
}

/* The emulator met an absent page and took it for a device. */
static void adapt_mmio(struct postcopy *pc, struct vcpu_side *vcpu, const struct postcopy_exit *exit,
		       const struct cpu_state *cpu, struct postcopy_answer *answer)
{
	const struct kvm_run *run = exit->run;
	struct page_set set = { 0 };

	(void)cpu;
	if (!memory_region(pc, run->mmio.phys_addr))
		return;
	if (!mmio_is_memory_access(pc, run)) {
		answer_error(answer, POSTCOPY_REASON_BAD_ACCESS);
		return;
	}
	if (postcopy_is_missing(pc, run->mmio.phys_addr))
		page_set_add(&set, memory_page(pc, run->mmio.phys_addr));
	vcpu->want_flags = run->mmio.is_write ? EXIT_FAULT_WRITE : EXIT_FAULT_READ;
	/* The guard has no say: completing the access is progress. */
	answer->action = POSTCOPY_COMPLETE_MMIO;
	answer->count = set.count;
	answer->gpa[0] = set.gpa[0];
}

typedef void adapter(struct postcopy *pc, struct vcpu_side *vcpu, const struct postcopy_exit *exit,
		     const struct cpu_state *cpu, struct postcopy_answer *answer);

static adapter *const adapters[POSTCOPY_SHAPES] = {
	[POSTCOPY_SHAPE_ANNOTATED] = adapt_annotated,
	[POSTCOPY_SHAPE_BARE] = adapt_bare,
	[POSTCOPY_SHAPE_MMIO] = adapt_mmio,
	[POSTCOPY_SHAPE_EMULATION] = adapt_emulation,
};

enum postcopy_action postcopy_adapt(struct postcopy *pc, uint32_t vcpu_index, const struct postcopy_exit *exit,
				    struct postcopy_answer *answer)
{
	struct vcpu_side *vcpu = &pc->vcpu[vcpu_index];
	struct cpu_state cpu;

	memset(answer, 0, sizeof(*answer));
	vcpu->want_count = 0;
	vcpu->want_flags = 0;
	answer->shape = shape_of(exit);
	if (answer->shape == POSTCOPY_SHAPE_NONE)
		return answer->action;
	if (!resolve_read_cpu(exit, &cpu)) {
		answer_error(answer, POSTCOPY_REASON_UNREADABLE);
		return answer->action;
	}
	answer->rip = cpu.regs.rip;
	adapters[answer->shape](pc, vcpu, exit, &cpu, answer);
	vcpu->want_count = answer->count;
	memcpy(vcpu->want, answer->gpa, answer->count * sizeof(answer->gpa[0]));
	return answer->action;
}

const char *postcopy_reason_text(enum postcopy_reason reason)
{
	static const char *const text[POSTCOPY_REASONS] = {
		[POSTCOPY_REASON_NONE] = "no error",
		[POSTCOPY_REASON_GATHER] = "a gather or scatter met an absent page, and its addresses cannot be told",
		[POSTCOPY_REASON_UNDECODED] = "the instruction that met an absent page is not known to the decoder",
		[POSTCOPY_REASON_UNREADABLE] = "the vCPU's registers or its code cannot be read",
		[POSTCOPY_REASON_UNEXPLAINED] = "KVM_RUN fails although every page the instruction needs is in place",
		[POSTCOPY_REASON_NO_PROGRESS] = "the same fault comes back although its pages were installed each time",
		[POSTCOPY_REASON_POISONED] = "the page is lost",
		[POSTCOPY_REASON_BAD_ACCESS] = "an MMIO access on RAM is longer than 8 bytes or crosses a page",
	};

	return (unsigned)reason < POSTCOPY_REASONS ? text[reason] : "unknown";
}
