/* What vmm.c shares with the two engines that run a guest: vmm_kvm.c and vmm_process.c. */
#ifndef VMM_MACHINE_H
#define VMM_MACHINE_H

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/types.h>

#include "vmm.h"
#include "vmm_walk.h"

struct kvm_run;
struct exits;

/* The boot slot, from guest physical address 0. */
#define VMM_BOOT_BYTES (2u << 20)

enum outcome { OUTCOME_AGAIN, OUTCOME_PARK, OUTCOME_DONE, OUTCOME_FAILED };

struct vcpu {
	struct vmm *vm;
	unsigned index;
	pthread_t thread;
	struct walk_slice slice;

	/* Under vm->lock. */
	int phase;
	pid_t tid;

	/* Set by the driving thread, read by the vCPU's own: leave the guest. */
	int stop;

	/* Written by the vCPU's thread with relaxed atomics, read by status at any time. */
	uint64_t guest_errors;
	uint64_t first_error_page;
	uint32_t first_error_kind;

	/* Written before phase becomes FAILED, read after. */
	int run_errno;
	uint32_t exit_reason;
	uint32_t suberror;
	uint64_t rip;

	/* KVM */
	int fd;
	struct kvm_run *run;
	bool mmio_owed; /* the access of an exit that waits for its page */

	/* Process guest: its only register, and the way out of a page fault. */
	volatile uint64_t tick;
	volatile sig_atomic_t touching;
	sigjmp_buf escape;
};

struct engine {
	int (*init)(struct vmm *vm, const char **op);
	void (*deinit)(struct vmm *vm);
	/* Runs the guest on the vCPU's thread until something ends it; never returns OUTCOME_AGAIN. */
	enum outcome (*run)(struct vcpu *vcpu);
	/* Before the vCPU leaves its parking place, and when it shall return to it; vm->lock is held. */
	void (*release)(struct vcpu *vcpu);
	void (*interrupt)(struct vcpu *vcpu);
	/* On the vCPU's thread when it was kicked by signal, in the signal's context. */
	void (*kicked)(struct vcpu *vcpu);
	uint64_t (*progress)(const struct vcpu *vcpu);
	size_t state_bytes;
	int (*save)(struct vcpu *vcpu, uint8_t *state);
	int (*load)(struct vcpu *vcpu, const uint8_t *state);
	void (*state_walk)(const uint8_t *state, struct vmm_walk *walk);
	uint64_t (*program_id)(void);
};

struct vmm {
	struct vmm_shape shape;
	uint8_t *memory;
	const struct engine *engine;

	pthread_mutex_t lock;
	pthread_cond_t changed;
	bool quit;
	unsigned threads;
	struct vcpu *vcpus;

	/* KVM */
	int kvm_fd;
	int vm_fd;
	size_t run_bytes;
	uint8_t *boot;
	struct exits *exits; /* NULL: absent pages are waited for in the kernel */
};

extern const struct engine vmm_kvm_engine __attribute__((visibility("hidden")));
extern const struct engine vmm_process_engine __attribute__((visibility("hidden")));

static inline bool vcpu_must_stop(const struct vcpu *vcpu)
{
	return __atomic_load_n(&vcpu->stop, __ATOMIC_ACQUIRE) != 0;
}

/* Record what the guest found wrong with a page. */
void vcpu_guest_error(struct vcpu *vcpu, uint64_t page, uint32_t kind);

#endif
