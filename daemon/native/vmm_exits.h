/* vCPUs whose absent pages come as exits: the machine's use of libpostcopy. */
#ifndef VMM_EXITS_H
#define VMM_EXITS_H

#include "vmm_machine.h"

#define VMM_EXIT_SHAPES 5

struct exits {
	struct postcopy *pc;
	uint64_t by_shape[VMM_EXIT_SHAPES]; /* relaxed atomics; enum postcopy_shape */
	/* The device: a thread of the VMM's own that reads guest memory. */
	pthread_t device;
	bool has_device;
	int device_stop;
	uint64_t device_reads;
};

/* Wait for what this vCPU was waiting for when it was parked, if anything. OUTCOME_AGAIN: run. */
enum outcome exits_settle(struct vcpu *vcpu);

/* What an outcome of KVM_RUN means; *handled is false if it is none of an absent page. */
enum outcome exits_react(struct vcpu *vcpu, int answer, int run_errno, bool *handled);

void exits_interrupt(struct vcpu *vcpu);
void exits_deinit(struct vmm *vm);

#endif
