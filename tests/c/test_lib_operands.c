// sources: ../libpostcopy/operands.c ../libpostcopy/stack.c ../libpostcopy/registers.c
// libs: -lcapstone
#include <string.h>

#include "../../daemon/libpostcopy/operands.h"
#include "check.h"

#define HERE 0x401000u

enum mode { LONG, PROTECTED, REAL };

struct range {
	uint64_t linear, len;
};

struct expectation {
	const char *name;
	enum mode mode;
	struct {
		const char *bytes;
		size_t len;
	} code;
	struct range range[4];
};

/* rax 3, rbx 0x10000, rcx 5, rdx -1, rsi 0x20000, rdi 0x30000, rsp 0x40000, rbp 0x50000, r8 0x60000, r15 -8; fs 0x700000 */
/* Machine code may contain zeros, so its length goes with it. */
#define CODE(text) { (text), sizeof(text) - 1 }

static const struct expectation expectations[] = {
	{ "mov rax,[rdi]", LONG, CODE("\x48\x8b\x07"), { { 0x30000, 8 } } },
	{ "mov [rdi+rsi*4+8],al", LONG, CODE("\x88\x44\xb7\x08"), { { 0xb0008, 1 } } },
	{ "mov rax,[r8+r15]", LONG, CODE("\x4b\x8b\x04\x38"), { { 0x5fff8, 8 } } },
	{ "mov eax,[rip+0x10]", LONG, CODE("\x8b\x05\x10\x00\x00\x00"), { { HERE + 6 + 16, 4 } } },
	{ "mov rax,fs:[0x10]", LONG, CODE("\x64\x48\x8b\x04\x25\x10\x00\x00\x00"), { { 0x700010, 8 } } },
	{ "mov eax,[edx+8]", LONG, CODE("\x67\x8b\x42\x08"), { { 7, 4 } } },
	{ "mov al,[moffs]", LONG, CODE("\xa0\x88\x77\x66\x55\x44\x33\x22\x11"), { { 0x1122334455667788, 1 } } },
	{ "add [rdi],1", LONG, CODE("\x83\x07\x01"), { { 0x30000, 4 } } },
	{ "lea", LONG, CODE("\x48\x8d\x07"), { { 0, 0 } } },
	{ "nop [rdi]", LONG, CODE("\x0f\x1f\x07"), { { 0, 0 } } },
	{ "prefetcht0", LONG, CODE("\x0f\x18\x0f"), { { 0, 0 } } },
	{ "mov rax,rbx", LONG, CODE("\x48\x89\xd8"), { { 0, 0 } } },
	{ "movups xmm0,[rdi]", LONG, CODE("\x0f\x10\x07"), { { 0x30000, 16 } } },
	{ "vmovups ymm0,[rdi]", LONG, CODE("\xc5\xfc\x10\x07"), { { 0x30000, 32 } } },
	{ "vmovups zmm0,[rdi+64]", LONG, CODE("\x62\xf1\x7c\x48\x10\x47\x01"), { { 0x30040, 64 } } },
	{ "cmpxchg16b", LONG, CODE("\x48\x0f\xc7\x0f"), { { 0x30000, 16 } } },
	{ "fxsave", LONG, CODE("\x0f\xae\x07"), { { 0x30000, 512 } } },
	{ "fnsave", LONG, CODE("\xdd\x37"), { { 0x30000, 108 } } },
	{ "maskmovdqu", LONG, CODE("\x66\x0f\xf7\xc1"), { { 0x30000, 16 } } },
	{ "xlat", LONG, CODE("\xd7"), { { 0x10003, 1 } } },
	{ "bt [rdi],rcx", LONG, CODE("\x48\x0f\xa3\x0f"), { { 0x30000, 8 } } },
	{ "bts [rdi],rdx: -1", LONG, CODE("\x48\x0f\xab\x17"), { { 0x2fff8, 8 } } },
	{ "bt [rdi],esi: 0x20000", LONG, CODE("\x0f\xa3\x37"), { { 0x34000, 4 } } },
	{ "bt [rdi],imm", LONG, CODE("\x0f\xba\x27\x05"), { { 0x30000, 4 } } },
	{ "push rax", LONG, CODE("\x50"), { { 0x3fff8, 8 } } },
	{ "push ax", LONG, CODE("\x66\x50"), { { 0x3fffe, 2 } } },
	{ "push [rdi]", LONG, CODE("\xff\x37"), { { 0x30000, 8 }, { 0x3fff8, 8 } } },
	{ "pop rax", LONG, CODE("\x58"), { { 0x40000, 8 } } },
	{ "pop [rsp+8]", LONG, CODE("\x8f\x44\x24\x08"), { { 0x40010, 8 }, { 0x40000, 8 } } },
	{ "pushfq", LONG, CODE("\x9c"), { { 0x3fff8, 8 } } },
	{ "popfq", LONG, CODE("\x9d"), { { 0x40000, 8 } } },
	{ "call rel", LONG, CODE("\xe8\x00\x00\x00\x00"), { { 0x3fff8, 8 } } },
	{ "call [rdi]", LONG, CODE("\xff\x17"), { { 0x30000, 8 }, { 0x3fff8, 8 } } },
	{ "jmp [rdi]", LONG, CODE("\xff\x27"), { { 0x30000, 8 } } },
	{ "ret", LONG, CODE("\xc3"), { { 0x40000, 8 } } },
	{ "ret 8", LONG, CODE("\xc2\x08\x00"), { { 0x40000, 8 } } },
	{ "retfq", LONG, CODE("\x48\xcb"), { { 0x40000, 16 } } },
	{ "iretq", LONG, CODE("\x48\xcf"), { { 0x40000, 40 } } },
	{ "leave", LONG, CODE("\xc9"), { { 0x50000, 8 } } },
	{ "enter 16,0", LONG, CODE("\xc8\x10\x00\x00"), { { 0x3fff8, 8 }, { 0x3ffe8, 1 } } },
	{ "enter 16,3", LONG, CODE("\xc8\x10\x00\x03"), { { 0x3ffe0, 32 }, { 0x4fff0, 16 }, { 0x3ffd0, 1 } } },
	{ "rep movsq", LONG, CODE("\xf3\x48\xa5"), { { 0x30000, 8 }, { 0x20000, 8 } } },
	{ "stosb", LONG, CODE("\xaa"), { { 0x30000, 1 } } },
	{ "lodsd", LONG, CODE("\xad"), { { 0x20000, 4 } } },
	{ "repe cmpsb", LONG, CODE("\xf3\xa6"), { { 0x20000, 1 }, { 0x30000, 1 } } },
	{ "repne scasw", LONG, CODE("\xf2\x66\xaf"), { { 0x30000, 2 } } },
	{ "outsb", LONG, CODE("\x6e"), { { 0x20000, 1 } } },
	{ "insd", LONG, CODE("\x6d"), { { 0x30000, 4 } } },
	{ "movsd xmm0,[rdi]", LONG, CODE("\xf2\x0f\x10\x07"), { { 0x30000, 8 } } },

	/* ds 0x1000, es 0x2000, ss 0x3000 */
	{ "mov eax,[edi]", PROTECTED, CODE("\x8b\x07"), { { 0x31000, 4 } } },
	{ "mov eax,[ebp]", PROTECTED, CODE("\x8b\x45\x00"), { { 0x53000, 4 } } },
	{ "mov eax,es:[edi]", PROTECTED, CODE("\x26\x8b\x07"), { { 0x32000, 4 } } },
	{ "movsd", PROTECTED, CODE("\xa5"), { { 0x32000, 4 }, { 0x21000, 4 } } },
	{ "push eax", PROTECTED, CODE("\x50"), { { 0x42ffc, 4 } } },
	{ "pushad", PROTECTED, CODE("\x60"), { { 0x42fe0, 32 } } },
	{ "popad", PROTECTED, CODE("\x61"), { { 0x43000, 32 } } },
	{ "call rel", PROTECTED, CODE("\xe8\x00\x00\x00\x00"), { { 0x42ffc, 4 } } },
	{ "wraps at 4 GiB", PROTECTED, CODE("\x8b\x82\x00\xf0\xff\xff"), { { 0xffffffff, 4 } } },
	{ "mov ax,[bx+si]", REAL, CODE("\x8b\x00"), { { 0x1000, 2 } } },
	{ "push ax", REAL, CODE("\x50"), { { 0x12ffe, 2 } } },
};

static struct cpu_state cpu_of(enum mode mode)
{
	struct cpu_state cpu = {
		.regs = { .rax = 3, .rbx = 0x10000, .rcx = 5, .rdx = UINT64_MAX, .rsi = 0x20000, .rdi = 0x30000,
			  .rsp = 0x40000, .rbp = 0x50000, .r8 = 0x60000, .r15 = (uint64_t)-8, .rip = HERE },
		.sregs = { .fs.base = 0x700000, .ds.base = 0x1000, .es.base = 0x2000, .ss.base = 0x3000 },
	};

	if (mode == LONG) {
		cpu.sregs.efer = 1 << 10;
		cpu.sregs.cs.l = 1;
	}
	cpu.sregs.cs.db = cpu.sregs.ss.db = mode == PROTECTED;
	return cpu;
}

static cs_insn *decode(csh decoder, const struct expectation *expectation)
{
	static const cs_mode modes[] = { CS_MODE_64, CS_MODE_32, CS_MODE_16 };
	uint8_t code[15] = { 0 };
	cs_insn *insn;

	memcpy(code, expectation->code.bytes, expectation->code.len);
	cs_option(decoder, CS_OPT_MODE, modes[expectation->mode]);
	CHECK_EQ(cs_disasm(decoder, code, expectation->code.len, HERE, 1, &insn), 1);
	return insn;
}

static void every_instruction_names_its_memory(csh decoder)
{
	for (size_t i = 0; i < sizeof(expectations) / sizeof(expectations[0]); i++) {
		const struct expectation *expectation = &expectations[i];
		struct cpu_state cpu = cpu_of(expectation->mode);
		cs_insn *insn = decode(decoder, expectation);
		struct access_list list;
		uint32_t count = 0;

		operands_collect(&cpu, insn, &list);
		while (count < 4 && expectation->range[count].len)
			count++;
		if (list.count != count)
			fprintf(stderr, "%s: %s %s\n", expectation->name, insn->mnemonic, insn->op_str);
		CHECK_EQ(list.count, count);
		for (uint32_t r = 0; r < count; r++) {
			if (list.access[r].linear != expectation->range[r].linear || list.access[r].len != expectation->range[r].len)
				fprintf(stderr, "%s: %s %s: %#llx + %llu\n", expectation->name, insn->mnemonic, insn->op_str,
					(unsigned long long)list.access[r].linear, (unsigned long long)list.access[r].len);
			CHECK_EQ(list.access[r].linear, expectation->range[r].linear);
			CHECK_EQ(list.access[r].len, expectation->range[r].len);
		}
		cs_free(insn, 1);
	}
}

static void a_repetition_that_is_over_touches_nothing(csh decoder)
{
	static const struct expectation movs = { "rep movsb", LONG, CODE("\xf3\xa4"), { { 0 } } };
	static const struct expectation narrow = { "rep movsb [edi]", LONG, CODE("\x67\xf3\xa4"), { { 0 } } };
	struct cpu_state cpu = cpu_of(LONG);
	cs_insn *insn = decode(decoder, &movs);
	struct access_list list;

	cpu.regs.rcx = 0;
	operands_collect(&cpu, insn, &list);
	CHECK_EQ(list.count, 0);
	cpu.regs.rcx = 1ull << 32;
	operands_collect(&cpu, insn, &list);
	CHECK_EQ(list.count, 2);
	cs_free(insn, 1);
	insn = decode(decoder, &narrow); /* counts in ecx */
	operands_collect(&cpu, insn, &list);
	CHECK_EQ(list.count, 0);
	cs_free(insn, 1);
}

static void gathers_and_scatters_are_known(csh decoder)
{
	static const struct expectation yes[] = {
		{ "vgatherdps", LONG, CODE("\xc4\xe2\x6d\x92\x04\x8f"), { { 0 } } },
		{ "vpgatherqq", LONG, CODE("\xc4\xe2\xed\x91\x04\xcf"), { { 0 } } },
		{ "vpscatterdd", LONG, CODE("\x62\xf2\x7d\x49\xa0\x04\x8f"), { { 0 } } },
	};
	static const struct expectation no = { "vpermd", LONG, CODE("\xc4\xe2\x7d\x36\x0f"), { { 0 } } };
	cs_insn *insn;

	for (size_t i = 0; i < sizeof(yes) / sizeof(yes[0]); i++) {
		insn = decode(decoder, &yes[i]);
		CHECK(operands_are_gathered(insn));
		cs_free(insn, 1);
	}
	insn = decode(decoder, &no);
	CHECK(!operands_are_gathered(insn));
	cs_free(insn, 1);
}

int main(void)
{
	csh decoder;

	CHECK_EQ(cs_open(CS_ARCH_X86, CS_MODE_64, &decoder), CS_ERR_OK);
	CHECK_EQ(cs_option(decoder, CS_OPT_DETAIL, CS_OPT_ON), CS_ERR_OK);
	every_instruction_names_its_memory(decoder);
	a_repetition_that_is_over_touches_nothing(decoder);
	gathers_and_scatters_are_known(decoder);
	cs_close(&decoder);
	return 0;
}
