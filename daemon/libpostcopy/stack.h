/* What an instruction touches through the stack pointer. */
#ifndef LIBPOSTCOPY_STACK_H
#define LIBPOSTCOPY_STACK_H

#include "operands.h"

/* Add the stack accesses of the instruction to `out`. */
void stack_collect(const struct cpu_state *cpu, const cs_insn *insn, struct access_list *out);

/* Of operands.c. */
void access_add(struct access_list *list, uint64_t linear, uint64_t len);

#endif
