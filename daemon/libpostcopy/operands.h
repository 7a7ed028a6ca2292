/* The memory that one decoded instruction touches, as linear addresses.
 *
 * Rather too much than too little: a page that is asked for and was not needed costs a fetch that the background push would
 * have made anyway; one that was needed and not asked for stops the vCPU. What an instruction touches besides its operands
 * (descriptor tables for segment loads, the TSS, what event delivery reads) belongs to the pinned set.
 */
#ifndef LIBPOSTCOPY_OPERANDS_H
#define LIBPOSTCOPY_OPERANDS_H

#include <capstone/capstone.h>
#include <stdbool.h>
#include <stdint.h>

#include "registers.h"

#define ACCESSES_MAX 12u

struct access_list {
	uint32_t count;
	struct {
		uint64_t linear;
		uint64_t len;
	} access[ACCESSES_MAX];
};

/* Whether it takes its addresses from a vector register: gathers and scatters, whose operands cannot be told. */
bool operands_are_gathered(const cs_insn *insn);

/* Collect the accesses of one instruction (one iteration of a repeated one). */
void operands_collect(const struct cpu_state *cpu, const cs_insn *insn, struct access_list *out);

/* Bytes of an XSAVE area up to the end of the last of `components` (bits as in XCR0) that the host knows. */
uint64_t operands_xsave_bytes(uint64_t components);

#endif
