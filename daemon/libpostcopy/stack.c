#include "stack.h"

#define PREFIX_OPERAND_SIZE 0x66

/* Bytes of one pushed value: the mode's, or what the operand-size prefix makes of it. */
static unsigned slot_bytes(const struct cpu_state *cpu, const cs_insn *insn)
{
	bool prefixed = insn->detail->x86.prefix[2] == PREFIX_OPERAND_SIZE;

	switch (cpu_code_bytes(cpu)) {
	case 8:
		return prefixed ? 2 : 8;
	case 4:
		return prefixed ? 2 : 4;
	default:
		return prefixed ? 4 : 2;
	}
}

/* `len` bytes at `offset` from a register of the stack segment. */
static void add_at(const struct cpu_state *cpu, uint64_t reg, int64_t offset, uint64_t len, struct access_list *out)
{
	uint64_t at = low_bytes(reg + (uint64_t)offset, cpu_stack_bytes(cpu));

	access_add(out, cpu_linear(cpu, X86_REG_SS, at), len);
}

static void push(const struct cpu_state *cpu, unsigned len, struct access_list *out)
{
	add_at(cpu, cpu->regs.rsp, -(int64_t)len, len, out);
}

static void pop(const struct cpu_state *cpu, unsigned len, struct access_list *out)
{
	add_at(cpu, cpu->regs.rsp, 0, len, out);
}

/* ENTER frame, level: pushes the frame pointer, copies level - 1 of the enclosing frames' pointers and pushes its own; then the
 * new top of the stack must be writable. Source: Intel SDM, "ENTER". */
static void enter(const struct cpu_state *cpu, const cs_insn *insn, struct access_list *out)
{
	const cs_x86 *x86 = &insn->detail->x86;
	unsigned slot = slot_bytes(cpu, insn);
	unsigned level = x86->op_count > 1 ? (unsigned)x86->operands[1].imm % 32 : 0;
	unsigned pushed = slot * (1 + level);
	int64_t frame = x86->operands[0].imm & 0xffff;

	push(cpu, pushed, out);
	if (level > 1)
		add_at(cpu, cpu->regs.rbp, -(int64_t)(slot * (level - 1)), slot * (level - 1), out);
	add_at(cpu, cpu->regs.rsp, -(int64_t)pushed - frame, 1, out);
}

/* Far transfers; the widths are in their names, as the decoder tells them apart. */
static void collect_far(const struct cpu_state *cpu, const cs_insn *insn, struct access_list *out)
{
	unsigned slot = cpu_code_bytes(cpu) == 8 ? 4 : slot_bytes(cpu, insn);

	switch (insn->id) {
	case X86_INS_LCALL:
		push(cpu, 2 * insn->detail->x86.operands[0].size, out);
		break;
	case X86_INS_RETF:
		pop(cpu, 2 * slot, out);
		break;
	case X86_INS_RETFQ:
		pop(cpu, 16, out);
		break;
	case X86_INS_IRET:
		pop(cpu, 5 * 2, out);
		break;
	case X86_INS_IRETD:
		pop(cpu, 5 * 4, out);
		break;
	case X86_INS_IRETQ:
		pop(cpu, 5 * 8, out);
		break;
	default:
		break;
	}
}

void stack_collect(const struct cpu_state *cpu, const cs_insn *insn, struct access_list *out)
{
	unsigned slot = slot_bytes(cpu, insn);

	switch (insn->id) {
	case X86_INS_PUSH:
	case X86_INS_PUSHF:
	case X86_INS_PUSHFD:
	case X86_INS_PUSHFQ:
		push(cpu, slot, out);
		break;
	case X86_INS_PUSHAW:
	case X86_INS_PUSHAL:
		push(cpu, 8 * slot, out);
		break;
	case X86_INS_CALL:
		/* A near branch in 64-bit mode is 64 bits wide whatever its prefixes. */
		push(cpu, cpu_code_bytes(cpu) == 8 ? 8 : slot, out);
		break;
	case X86_INS_POP:
	case X86_INS_POPF:
	case X86_INS_POPFD:
	case X86_INS_POPFQ:
		pop(cpu, slot, out);
		break;
	case X86_INS_POPAW:
	case X86_INS_POPAL:
		pop(cpu, 8 * slot, out);
		break;
	case X86_INS_RET:
		pop(cpu, cpu_code_bytes(cpu) == 8 ? 8 : slot, out);
		break;
	case X86_INS_LEAVE:
		add_at(cpu, cpu->regs.rbp, 0, slot, out);
		break;
	case X86_INS_ENTER:
		enter(cpu, insn, out);
		break;
	default:
		collect_far(cpu, insn, out);
	}
}
