#include "registers.h"

#include <stddef.h>

#define EFER_LMA (1ull << 10)

struct register_place {
	x86_reg full, dword, word;
	size_t offset;
};

#define PLACE(full, dword, word, field) \
	{ X86_REG_##full, X86_REG_##dword, X86_REG_##word, offsetof(struct kvm_regs, field) }

static const struct register_place places[] = {
	PLACE(RAX, EAX, AX, rax),    PLACE(RBX, EBX, BX, rbx),	  PLACE(RCX, ECX, CX, rcx),    PLACE(RDX, EDX, DX, rdx),
	PLACE(RSI, ESI, SI, rsi),    PLACE(RDI, EDI, DI, rdi),	  PLACE(RSP, ESP, SP, rsp),    PLACE(RBP, EBP, BP, rbp),
	PLACE(R8, R8D, R8W, r8),     PLACE(R9, R9D, R9W, r9),	  PLACE(R10, R10D, R10W, r10), PLACE(R11, R11D, R11W, r11),
	PLACE(R12, R12D, R12W, r12), PLACE(R13, R13D, R13W, r13), PLACE(R14, R14D, R14W, r14), PLACE(R15, R15D, R15W, r15),
};

unsigned cpu_code_bytes(const struct cpu_state *cpu)
{
	if (cpu->sregs.efer & EFER_LMA && cpu->sregs.cs.l)
		return 8;
	return cpu->sregs.cs.db ? 4 : 2;
}

unsigned cpu_stack_bytes(const struct cpu_state *cpu)
{
	if (cpu_code_bytes(cpu) == 8)
		return 8;
	return cpu->sregs.ss.db ? 4 : 2;
}

uint64_t cpu_register(const struct cpu_state *cpu, x86_reg reg)
{
	for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
		const struct register_place *place = &places[i];
		uint64_t value = *(const uint64_t *)((const char *)&cpu->regs + place->offset);

		if (reg == place->full)
			return value;
		if (reg == place->dword)
			return low_bytes(value, 4);
		if (reg == place->word)
			return low_bytes(value, 2);
	}
	return 0;
}

static uint64_t segment_base(const struct cpu_state *cpu, x86_reg segment)
{
	switch (segment) {
	case X86_REG_CS:
		return cpu->sregs.cs.base;
	case X86_REG_SS:
		return cpu->sregs.ss.base;
	case X86_REG_ES:
		return cpu->sregs.es.base;
	case X86_REG_FS:
		return cpu->sregs.fs.base;
	case X86_REG_GS:
		return cpu->sregs.gs.base;
	default:
		return cpu->sregs.ds.base;
	}
}

uint64_t cpu_linear(const struct cpu_state *cpu, x86_reg segment, uint64_t offset)
{
	if (cpu_code_bytes(cpu) != 8)
		return low_bytes(segment_base(cpu, segment) + offset, 4);
	/* In 64-bit mode only these two have a base. Source: Intel SDM volume 1, 3.4.2.1. */
	if (segment == X86_REG_FS || segment == X86_REG_GS)
		return segment_base(cpu, segment) + offset;
	return offset;
}
