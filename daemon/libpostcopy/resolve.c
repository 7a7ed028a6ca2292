#include "resolve.h"

#include <string.h>
#include <sys/ioctl.h>

#include "memory.h"
#include "operands.h"
#include "walk.h"

#define INSN_BYTES_MAX 15u

/* One exit being looked at. */
struct look {
	struct postcopy *pc;
	int vcpu_fd;
	const struct cpu_state *cpu;
	struct guest_view view;
	struct page_set *out;
};

void page_set_add(struct page_set *set, uint64_t gpa)
{
	for (uint32_t i = 0; i < set->count; i++) {
		if (set->gpa[i] == gpa)
			return;
	}
	if (set->count < POSTCOPY_PAGES_MAX)
		set->gpa[set->count++] = gpa;
}

bool resolve_read_cpu(const struct postcopy_exit *exit, struct cpu_state *cpu)
{
#ifdef KVM_SYNC_X86_REGS
	const uint64_t both = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
	const struct kvm_run *run = exit->run;

	/* KVM_RUN fails with EINVAL where the kernel does not know these, so what is asked for is there; also after EFAULT.
	 * Source: Documentation/virt/kvm/api.rst, KVM_CAP_SYNC_REGS, and kvm_arch_vcpu_ioctl_run in arch/x86/kvm/x86.c. */
	if ((run->kvm_valid_regs & both) == both) {
		cpu->regs = run->s.regs.regs;
		cpu->sregs = run->s.regs.sregs;
		return true;
	}
#endif
	return !ioctl(exit->vcpu_fd, KVM_GET_REGS, &cpu->regs) && !ioctl(exit->vcpu_fd, KVM_GET_SREGS, &cpu->sregs);
}

static bool view_is_missing(void *context, uint64_t gpa)
{
	const struct look *look = context;

	return postcopy_is_missing(look->pc, gpa);
}

static const void *view_bytes(void *context, uint64_t gpa, size_t len)
{
	const struct look *look = context;

	return memory_bytes(look->pc, gpa, len);
}

static bool view_translate(void *context, uint64_t linear, uint64_t *gpa)
{
	const struct look *look = context;
	struct kvm_translation translation = { .linear_address = linear };

	if (ioctl(look->vcpu_fd, KVM_TRANSLATE, &translation) || !translation.valid)
		return false;
	*gpa = translation.physical_address;
	return true;
}

static void look_init(struct look *look, struct postcopy *pc, int vcpu_fd, const struct cpu_state *cpu,
		      struct page_set *out)
{
	*look = (struct look){ .pc = pc, .vcpu_fd = vcpu_fd, .cpu = cpu, .out = out };
	look->view = (struct guest_view){ look, view_is_missing, view_bytes, view_translate };
	out->count = 0;
}

/* Follow a linear address and note what is missing for it. True: *gpa is there. */
static bool need_page(struct look *look, uint64_t linear, uint64_t *gpa)
{
	switch (walk_linear(&look->view, &look->cpu->sregs, linear, gpa)) {
	case WALK_UNMAPPED:
		return false;
	case WALK_NEEDS_PAGE:
		page_set_add(look->out, memory_page(look->pc, *gpa));
		return false;
	case WALK_MAPPED:
		break;
	}
	if (!postcopy_is_missing(look->pc, *gpa))
		return true;
	page_set_add(look->out, memory_page(look->pc, *gpa));
	return false;
}

static void need_range(struct look *look, uint64_t linear, uint64_t len)
{
	uint64_t first = linear & ~(PAGE_BYTES - 1), pages = ((linear & (PAGE_BYTES - 1)) + len + PAGE_BYTES - 1) / PAGE_BYTES;

	/* Modulo 2^64: an access may wrap, and the walk takes any address. */
	for (uint64_t i = 0; i < pages; i++) {
		uint64_t gpa;

		need_page(look, first + i * PAGE_BYTES, &gpa);
	}
}

/* Copy the code from `linear` to the end of its page, at most `max` bytes; 0: missing, not mapped or not readable. */
static size_t read_code(struct look *look, uint64_t linear, uint8_t *out, size_t max)
{
	size_t len = PAGE_BYTES - (linear & (PAGE_BYTES - 1));
	const void *bytes;
	uint64_t gpa;

	if (len > max)
		len = max;
	if (!need_page(look, linear, &gpa))
		return 0;
	bytes = memory_bytes(look->pc, gpa, len);
	if (!bytes)
		return 0;
	memcpy(out, bytes, len);
	return len;
}

static cs_mode decoder_mode(const struct cpu_state *cpu)
{
	switch (cpu_code_bytes(cpu)) {
	case 8:
		return CS_MODE_64;
	case 4:
		return CS_MODE_32;
	default:
		return CS_MODE_16;
	}
}

static bool open_decoder(struct vcpu_side *vcpu)
{
	if (vcpu->decoder)
		return true;
	if (cs_open(CS_ARCH_X86, CS_MODE_64, &vcpu->decoder) != CS_ERR_OK) {
		vcpu->decoder = 0;
		return false;
	}
	if (cs_option(vcpu->decoder, CS_OPT_DETAIL, CS_OPT_ON) == CS_ERR_OK)
		vcpu->insn = cs_malloc(vcpu->decoder);
	if (vcpu->insn)
		return true;
	resolve_deinit(vcpu);
	return false;
}

void resolve_deinit(struct vcpu_side *vcpu)
{
	if (vcpu->insn)
		cs_free(vcpu->insn, 1);
	if (vcpu->decoder)
		cs_close(&vcpu->decoder);
	vcpu->insn = NULL;
	vcpu->decoder = 0;
}

static bool decode(struct vcpu_side *vcpu, const struct cpu_state *cpu, const uint8_t *code, size_t len)
{
	uint64_t address = cpu->regs.rip;

	cs_option(vcpu->decoder, CS_OPT_MODE, (size_t)decoder_mode(cpu));
	return cs_disasm_iter(vcpu->decoder, &code, &len, &address, vcpu->insn);
}

/* Decode the instruction at RIP into vcpu->insn. With pages noted in look->out: not yet, these come first. */
static enum postcopy_reason decode_at_rip(struct look *look, struct vcpu_side *vcpu)
{
	const struct cpu_state *cpu = look->cpu;
	uint64_t rip = cpu_linear(cpu, X86_REG_CS, cpu->regs.rip);
	uint8_t code[INSN_BYTES_MAX];
	size_t len, more;

	len = read_code(look, rip, code, sizeof(code));
	if (!len)
		return look->out->count ? POSTCOPY_REASON_NONE : POSTCOPY_REASON_UNREADABLE;
	if (decode(vcpu, cpu, code, len))
		return POSTCOPY_REASON_NONE;
	if (len == sizeof(code))
		return POSTCOPY_REASON_UNDECODED;
	/* It goes on in the next page. */
	more = read_code(look, rip + len, code + len, sizeof(code) - len);
	if (look->out->count)
		return POSTCOPY_REASON_NONE;
	return more && decode(vcpu, cpu, code, len + more) ? POSTCOPY_REASON_NONE : POSTCOPY_REASON_UNDECODED;
}

enum postcopy_reason resolve_code(struct postcopy *pc, struct vcpu_side *vcpu, int vcpu_fd, const struct cpu_state *cpu,
				  struct page_set *out)
{
	struct look look;

	look_init(&look, pc, vcpu_fd, cpu, out);
	if (!open_decoder(vcpu))
		return POSTCOPY_REASON_UNREADABLE;
	return decode_at_rip(&look, vcpu);
}

enum postcopy_reason resolve_instruction(struct postcopy *pc, struct vcpu_side *vcpu, int vcpu_fd,
					 const struct cpu_state *cpu, struct page_set *out)
{
	struct access_list accesses;
	enum postcopy_reason reason;
	struct look look;

	reason = resolve_code(pc, vcpu, vcpu_fd, cpu, out);
	if (reason || out->count)
		return reason;
	if (operands_are_gathered(vcpu->insn))
		return POSTCOPY_REASON_GATHER;
	look_init(&look, pc, vcpu_fd, cpu, out);
	operands_collect(cpu, vcpu->insn, &accesses);
	for (uint32_t i = 0; i < accesses.count; i++)
		need_range(&look, accesses.access[i].linear, accesses.access[i].len);
	return POSTCOPY_REASON_NONE;
}
