#include "operands.h"

#include <cpuid.h>
#include <string.h>

#include "stack.h"

#define FXSAVE_BYTES 512u
#define FNSAVE_BYTES 108u
#define XSAVE_LEAF 0xdu
#define XSAVE_BYTES_MIN 576u /* legacy region and header */

#define PREFIX_REP 0xf3
#define PREFIX_REPNE 0xf2

bool operands_are_gathered(const cs_insn *insn)
{
	/* By name, as there are a dozen each; the prefetching ones touch nothing that could fail. */
	const char *name = insn->mnemonic;

	if (strstr(name, "pf"))
		return false;
	return !strncmp(name, "vgather", 7) || !strncmp(name, "vpgather", 8) || !strncmp(name, "vscatter", 8) ||
	       !strncmp(name, "vpscatter", 9);
}

uint64_t operands_xsave_bytes(uint64_t components)
{
	uint64_t bytes = XSAVE_BYTES_MIN;
	unsigned size, offset, ecx, edx;

	/* Those of the standard format; compacted, each lies no further back. Source: Intel SDM volume 1, 13.4. */
	for (unsigned i = 2; i < 63; i++) {
		if (components >> i & 1 && __get_cpuid_count(XSAVE_LEAF, i, &size, &offset, &ecx, &edx) && bytes < offset + size)
			bytes = offset + size;
	}
	return bytes;
}

/* Has a memory operand and does not touch it, or does not fault on it. */
static bool ignores_memory(unsigned id)
{
	switch (id) {
	case X86_INS_LEA:
	case X86_INS_NOP:
	case X86_INS_PREFETCH:
	case X86_INS_PREFETCHNTA:
	case X86_INS_PREFETCHT0:
	case X86_INS_PREFETCHT1:
	case X86_INS_PREFETCHT2:
	case X86_INS_PREFETCHW:
	case X86_INS_INVLPG:
		return true;
	default:
		return false;
	}
}

/* The length of a memory operand; the decoder does not know it of the state-saving instructions. */
static uint64_t operand_bytes(const struct cpu_state *cpu, unsigned id, const cs_x86_op *operand)
{
	switch (id) {
	case X86_INS_FXSAVE:
	case X86_INS_FXSAVE64:
	case X86_INS_FXRSTOR:
	case X86_INS_FXRSTOR64:
		return FXSAVE_BYTES;
	case X86_INS_FNSAVE:
	case X86_INS_FRSTOR:
		return FNSAVE_BYTES;
	case X86_INS_XSAVE:
	case X86_INS_XSAVE64:
	case X86_INS_XSAVEC:
	case X86_INS_XSAVEC64:
	case X86_INS_XSAVEOPT:
	case X86_INS_XSAVEOPT64:
	case X86_INS_XSAVES:
	case X86_INS_XSAVES64:
	case X86_INS_XRSTOR:
	case X86_INS_XRSTOR64:
	case X86_INS_XRSTORS:
	case X86_INS_XRSTORS64:
		return operands_xsave_bytes(cpu->regs.rdx << 32 | (cpu->regs.rax & 0xffffffffu));
	default:
		return operand->size;
	}
}

void access_add(struct access_list *list, uint64_t linear, uint64_t len)
{
	/* No instruction has more than four; the limit only keeps a surprise of the decoder's within bounds. */
	if (!len || list->count == ACCESSES_MAX)
		return;
	list->access[list->count].linear = linear;
	list->access[list->count].len = len;
	list->count++;
}

/* The offset of a memory operand within its segment. */
static uint64_t operand_offset(const struct cpu_state *cpu, const cs_insn *insn, const x86_op_mem *mem)
{
	uint64_t base;

	if (mem->base == X86_REG_RIP || mem->base == X86_REG_EIP)
		base = insn->address + insn->size;
	else
		base = cpu_register(cpu, mem->base);
	/* POP computes its destination with the stack pointer it leaves. Source: Intel SDM, "POP". */
	if (insn->id == X86_INS_POP && (mem->base == X86_REG_RSP || mem->base == X86_REG_ESP || mem->base == X86_REG_SP))
		base += insn->detail->x86.operands[0].size;
	return base + cpu_register(cpu, mem->index) * (uint64_t)mem->scale + (uint64_t)mem->disp;
}

static x86_reg default_segment(const x86_op_mem *mem)
{
	switch (mem->base) {
	case X86_REG_RSP:
	case X86_REG_ESP:
	case X86_REG_SP:
	case X86_REG_RBP:
	case X86_REG_EBP:
	case X86_REG_BP:
		return X86_REG_SS;
	default:
		return X86_REG_DS;
	}
}

/* BT and its kin with a register reach up to 2^60 bytes from their operand. Source: Intel SDM volume 2, 3.1.1.9. */
static int64_t bit_displacement(const struct cpu_state *cpu, const cs_insn *insn)
{
	const cs_x86 *x86 = &insn->detail->x86;
	uint64_t bits;

	switch (insn->id) {
	case X86_INS_BT:
	case X86_INS_BTS:
	case X86_INS_BTR:
	case X86_INS_BTC:
		break;
	default:
		return 0;
	}
	if (x86->op_count != 2 || x86->operands[1].type != X86_OP_REG)
		return 0;
	bits = cpu_register(cpu, x86->operands[1].reg);
	switch (x86->operands[1].size) {
	case 2:
		return ((int16_t)bits >> 4) * 2;
	case 4:
		return (int64_t)((int32_t)bits >> 5) * 4;
	default:
		return ((int64_t)bits >> 6) * 8;
	}
}

static void add_operand(const struct cpu_state *cpu, const cs_insn *insn, const cs_x86_op *operand,
			struct access_list *out)
{
	x86_reg segment = operand->mem.segment ? operand->mem.segment : default_segment(&operand->mem);
	uint64_t offset = operand_offset(cpu, insn, &operand->mem) + (uint64_t)bit_displacement(cpu, insn);

	access_add(out, cpu_linear(cpu, segment, low_bytes(offset, insn->detail->x86.addr_size)),
		   operand_bytes(cpu, insn->id, operand));
}

static bool is_string(unsigned id)
{
	switch (id) {
	case X86_INS_MOVSB:
	case X86_INS_MOVSW:
	case X86_INS_MOVSD:
	case X86_INS_MOVSQ:
	case X86_INS_CMPSB:
	case X86_INS_CMPSW:
	case X86_INS_CMPSD:
	case X86_INS_CMPSQ:
	case X86_INS_STOSB:
	case X86_INS_STOSW:
	case X86_INS_STOSD:
	case X86_INS_STOSQ:
	case X86_INS_LODSB:
	case X86_INS_LODSW:
	case X86_INS_LODSD:
	case X86_INS_LODSQ:
	case X86_INS_SCASB:
	case X86_INS_SCASW:
	case X86_INS_SCASD:
	case X86_INS_SCASQ:
	case X86_INS_INSB:
	case X86_INS_INSW:
	case X86_INS_INSD:
	case X86_INS_OUTSB:
	case X86_INS_OUTSW:
	case X86_INS_OUTSD:
		return true;
	default:
		return false;
	}
}

/* A repeated string instruction whose count is used up touches nothing. */
static bool is_finished(const struct cpu_state *cpu, const cs_insn *insn)
{
	const cs_x86 *x86 = &insn->detail->x86;

	/* The scalar MOVSD and CMPSD of SSE share the names and a prefix; they have a vector register. */
	if (!is_string(insn->id) || (x86->prefix[0] != PREFIX_REP && x86->prefix[0] != PREFIX_REPNE))
		return false;
	for (uint8_t i = 0; i < x86->op_count; i++) {
		if (x86->operands[i].type == X86_OP_REG && x86->operands[i].size > 8)
			return false;
	}
	return low_bytes(cpu->regs.rcx, x86->addr_size) == 0;
}

/* Operands that are in no operand list. */
static void add_implicit(const struct cpu_state *cpu, const cs_insn *insn, struct access_list *out)
{
	const cs_x86 *x86 = &insn->detail->x86;
	unsigned bytes = x86->addr_size;

	switch (insn->id) {
	case X86_INS_XLATB:
		access_add(out, cpu_linear(cpu, X86_REG_DS, low_bytes(cpu->regs.rbx + (cpu->regs.rax & 0xff), bytes)), 1);
		break;
	case X86_INS_MASKMOVDQU:
	case X86_INS_VMASKMOVDQU:
	case X86_INS_MASKMOVQ:
		access_add(out, cpu_linear(cpu, X86_REG_DS, low_bytes(cpu->regs.rdi, bytes)), x86->operands[0].size);
		break;
	default:
		stack_collect(cpu, insn, out);
	}
}

void operands_collect(const struct cpu_state *cpu, const cs_insn *insn, struct access_list *out)
{
	const cs_x86 *x86 = &insn->detail->x86;

	out->count = 0;
	if (ignores_memory(insn->id) || is_finished(cpu, insn))
		return;
	for (uint8_t i = 0; i < x86->op_count; i++) {
		if (x86->operands[i].type == X86_OP_MEM)
			add_operand(cpu, insn, &x86->operands[i], out);
	}
	add_implicit(cpu, insn, out);
}
