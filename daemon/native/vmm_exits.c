#define _GNU_SOURCE
#include "vmm_exits.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

#include "libpostcopy.h"

_Static_assert(VMM_EXIT_SHAPES == POSTCOPY_SHAPES, "every shape is counted");

/* Between two reads of the device: often enough to meet absent pages, seldom enough to leave them to the vCPUs. */
#define DEVICE_PAUSE_NS 200000

static const void *boot_memory(void *context, uint64_t gpa, size_t len)
{
	struct vmm *vm = context;

	return gpa < VMM_BOOT_BYTES && len <= VMM_BOOT_BYTES - gpa ? vm->boot + gpa : NULL;
}

/* Have KVM leave the registers in kvm_run at every exit: libpostcopy needs them, and asking takes two system calls. */
static void share_registers(struct vmm *vm)
{
#ifdef KVM_SYNC_X86_REGS
	const int both = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;

	if ((ioctl(vm->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_SYNC_REGS) & both) != both)
		return;
	for (unsigned i = 0; i < vm->shape.vcpus; i++)
		vm->vcpus[i].run->kvm_valid_regs = (uint64_t)both;
#else
	(void)vm;
#endif
}

int vmm_use_exits(struct vmm *vm, const char *path, int uffd, uint64_t page_size)
{
	const struct postcopy_region region = {
		.gpa = VMM_MEMORY_GPA,
		.hva = (uintptr_t)vm->memory,
		.size = vm->shape.memory_bytes,
		.page_size = page_size,
	};
	const struct postcopy_config config = {
		.config_size = sizeof(config),
		.uffd = uffd,
		.vcpus = vm->shape.vcpus,
		.regions = &region,
		.region_count = 1,
		.other_memory = boot_memory,
		.context = vm,
	};
	struct exits *exits;
	int error;

	if (vm->exits || vm->engine != &vmm_kvm_engine)
		return -EINVAL;
	exits = calloc(1, sizeof(*exits));
	if (!exits)
		return -ENOMEM;
	error = postcopy_connect(path, &config, &exits->pc);
	if (error) {
		free(exits);
		return error;
	}
	vm->exits = exits;
	share_registers(vm);
	return 0;
}

/* Reads a byte of every page once, in an order of its own: what a device that reads its queues does. */
static void *device_main(void *arg)
{
	struct vmm *vm = arg;
	uint64_t pages = vm->shape.memory_bytes / VMM_PAGE, page = 0;

	for (uint64_t i = 0; i < pages && !__atomic_load_n(&vm->exits->device_stop, __ATOMIC_RELAXED); i++) {
		const struct timespec pause = { .tv_nsec = DEVICE_PAUSE_NS };
		volatile const uint8_t *at;

		/* A stride prime to every size up to 16 TiB visits all pages. */
		page = (page + 2654435761u) % pages;
		at = vm->memory + page * VMM_PAGE;
		(void)*at;
		__atomic_fetch_add(&vm->exits->device_reads, 1, __ATOMIC_RELAXED);
		nanosleep(&pause, NULL);
	}
	return NULL;
}

int vmm_start_device(struct vmm *vm)
{
	int error;

	if (!vm->exits || vm->exits->has_device)
		return -EINVAL;
	error = pthread_create(&vm->exits->device, NULL, device_main, vm);
	vm->exits->has_device = error == 0;
	return -error;
}

void vmm_exits_status(struct vmm *vm, struct vmm_exits_status *status)
{
	memset(status, 0, sizeof(*status));
	if (!vm->exits)
		return;
	status->annotated = __atomic_load_n(&vm->exits->by_shape[POSTCOPY_SHAPE_ANNOTATED], __ATOMIC_RELAXED);
	status->bare = __atomic_load_n(&vm->exits->by_shape[POSTCOPY_SHAPE_BARE], __ATOMIC_RELAXED);
	status->mmio = __atomic_load_n(&vm->exits->by_shape[POSTCOPY_SHAPE_MMIO], __ATOMIC_RELAXED);
	status->emulation = __atomic_load_n(&vm->exits->by_shape[POSTCOPY_SHAPE_EMULATION], __ATOMIC_RELAXED);
	status->device_reads = __atomic_load_n(&vm->exits->device_reads, __ATOMIC_RELAXED);
	status->complete = postcopy_is_complete(vm->exits->pc);
}

enum outcome exits_settle(struct vcpu *vcpu)
{
	struct postcopy *pc = vcpu->vm->exits->pc;

	for (;;) {
		switch (postcopy_wait(pc, vcpu->index)) {
		case POSTCOPY_RESUMED:
			if (vcpu->mmio_owed && !postcopy_complete_mmio(pc, vcpu->run))
				return OUTCOME_FAILED;
			vcpu->mmio_owed = false;
			return OUTCOME_AGAIN;
		case POSTCOPY_INTERRUPTED:
			if (vcpu_must_stop(vcpu))
				return OUTCOME_PARK;
			break;
		default:
			return OUTCOME_FAILED;
		}
	}
}

enum outcome exits_react(struct vcpu *vcpu, int answer, int run_errno, bool *handled)
{
	struct exits *exits = vcpu->vm->exits;
	const struct postcopy_exit exit = { answer, run_errno, vcpu->fd, vcpu->run };
	struct postcopy_answer what;

	*handled = true;
	switch (postcopy_adapt(exits->pc, vcpu->index, &exit, &what)) {
	case POSTCOPY_NOT_A_FAULT:
		*handled = false;
		return OUTCOME_AGAIN;
	case POSTCOPY_COMPLETE_MMIO:
		vcpu->mmio_owed = true;
		break;
	case POSTCOPY_WAIT:
		break;
	case POSTCOPY_RUN_AGAIN:
		return OUTCOME_AGAIN;
	case POSTCOPY_ERROR:
		*handled = false;
		return OUTCOME_FAILED;
	}
	__atomic_fetch_add(&exits->by_shape[what.shape], 1, __ATOMIC_RELAXED);
	return exits_settle(vcpu);
}

void exits_interrupt(struct vcpu *vcpu)
{
	postcopy_kick(vcpu->vm->exits->pc, vcpu->index);
}

void exits_deinit(struct vmm *vm)
{
	if (!vm->exits)
		return;
	if (vm->exits->has_device) {
		__atomic_store_n(&vm->exits->device_stop, 1, __ATOMIC_RELAXED);
		pthread_join(vm->exits->device, NULL);
	}
	postcopy_close(vm->exits->pc);
	free(vm->exits);
	vm->exits = NULL;
}
