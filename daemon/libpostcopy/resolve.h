/* Which pages an instruction needs that are missing: its own, those of the page tables on the way, its operands'. */
#ifndef LIBPOSTCOPY_RESOLVE_H
#define LIBPOSTCOPY_RESOLVE_H

#include "handle.h"
#include "registers.h"

/* A set of pages to ask for; what does not fit comes with the next exit. */
struct page_set {
	uint32_t count;
	uint64_t gpa[POSTCOPY_PAGES_MAX];
};

void page_set_add(struct page_set *set, uint64_t gpa);

/* Read the vCPU's registers: from kvm_run where the VMM had KVM put them there, else by asking KVM. */
bool resolve_read_cpu(const struct postcopy_exit *exit, struct cpu_state *cpu);

/* The missing pages among those of the instruction at RIP, its page tables and its operands. A reason other than NONE: the
 * instruction cannot be told. */
enum postcopy_reason resolve_instruction(struct postcopy *pc, struct vcpu_side *vcpu, int vcpu_fd,
					 const struct cpu_state *cpu, struct page_set *out);

/* The same for the code alone: what KVM's emulator needs to fetch the instruction. */
enum postcopy_reason resolve_code(struct postcopy *pc, struct vcpu_side *vcpu, int vcpu_fd, const struct cpu_state *cpu,
				  struct page_set *out);

void resolve_deinit(struct vcpu_side *vcpu);

#endif
