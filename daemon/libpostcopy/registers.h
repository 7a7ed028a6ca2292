/* Registers by the names the decoder gives them. */
#ifndef LIBPOSTCOPY_REGISTERS_H
#define LIBPOSTCOPY_REGISTERS_H

#include <capstone/capstone.h>
#include <linux/kvm.h>
#include <stdint.h>

/* The guest's registers as far as addresses depend on them. */
struct cpu_state {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
};

/* Bytes of a near address where code runs: 8, 4 or 2. */
unsigned cpu_code_bytes(const struct cpu_state *cpu);

/* Bytes of the stack pointer. */
unsigned cpu_stack_bytes(const struct cpu_state *cpu);

/* The value of a general-purpose register, zero-extended; 0 for none and for those that no address is made of. */
uint64_t cpu_register(const struct cpu_state *cpu, x86_reg reg);

/* The linear address of segment:offset; `segment` X86_REG_INVALID is a segment with base 0 in long mode and DS elsewhere. */
uint64_t cpu_linear(const struct cpu_state *cpu, x86_reg segment, uint64_t offset);

static inline uint64_t low_bytes(uint64_t value, unsigned bytes)
{
	return bytes >= 8 ? value : value & ((1ull << bytes * 8) - 1);
}

#endif
