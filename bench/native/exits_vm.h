/* A virtual machine whose vCPUs touch one page after the other and time each touch, for measuring how faults are delivered. */
#ifndef POSTCOPY_BENCH_EXITS_VM_H
#define POSTCOPY_BENCH_EXITS_VM_H

#include <linux/kvm.h>
#include <pthread.h>

#include "bench.h"

#define VM_VCPUS_MAX 64u
#define VM_MEMORY_GPA (4ul << 30)

struct postcopy;

struct vm_vcpu {
	struct vm *vm;
	unsigned index;
	int fd;
	struct kvm_run *run;
	pthread_t thread;
	size_t first, count; /* the pages of this round */
	uint64_t *log;	     /* time-stamp counter ticks, one a touch */
	uint64_t wrong, exits;
	uint64_t began, ended;
};

struct vm {
	int kvm, fd;
	size_t run_bytes;
	uint8_t *boot, *logs, *memory;
	size_t pages;
	unsigned vcpus;
	double ns_per_tick;
	struct vm_vcpu vcpu[VM_VCPUS_MAX];
	pthread_barrier_t start, end;
	bool quit;
	struct postcopy *pc; /* of this round; NULL: absent pages are waited for in the kernel */
};

struct vm_round {
	double wall_s;
	double pages_s; /* of different pages */
	double cpu_us;	/* of the process, a page */
	uint64_t wrong; /* pages that did not begin with their index + 1 */
	uint64_t exits; /* that were faults */
	uint64_t *ns;	/* every touch, sorted; the caller frees */
	size_t touches;
};

/* Make a VM of `vcpus` over warmed memory of `pages`, its threads waiting. Ends the program if it cannot. */
void vm_init(struct vm *vm, unsigned vcpus, size_t pages);
void vm_deinit(struct vm *vm);

/* Have the memory absent again. It must not be registered with a userfaultfd. */
void vm_forget_memory(struct vm *vm);

/* Register the memory with a new userfaultfd; with `exits` a fault inside KVM_RUN fails instead of waiting. */
int vm_register(const struct vm *vm, bool exits);
void vm_unregister(const struct vm *vm, int uffd);

/* Connect libpostcopy for a round by exits. image_fd: -1, or the source's file, for vCPUs that install by themselves. */
void vm_connect(struct vm *vm, const char *path, int uffd, int image_fd);
void vm_disconnect(struct vm *vm);

/* Nanoseconds of processor time that a KVM_RUN costs which fails at an absent page at once: into the guest and out again. */
uint64_t vm_exit_cost_ns(struct vm *vm);

/* Let every vCPU touch its part of the memory, or with `overlap` all of it, and wait for the last. */
struct vm_round vm_run(struct vm *vm, bool overlap);

/* As JSON: pages_s, cpu_us, exits, us {"p50": …} of a touch. */
void vm_print_round(const struct vm_round *round);

#endif
