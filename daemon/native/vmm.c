/*
 * The life of a machine: its vCPU threads, and how they are started, stopped and asked.
 *
 * Every vCPU has one thread for its whole life, so a thread id means the same vCPU in every fault message. A thread
 * sleeps on `changed` while its vCPU is not RUNNING. All phase changes happen under `lock`; only vmm_start and
 * vmm_load make a vCPU RUNNING or PARKED from outside, and only while its thread sleeps.
 */
#define _GNU_SOURCE
#include "vmm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "vmm_machine.h"

static __thread struct vcpu *this_vcpu;
static pthread_once_t kick_once = PTHREAD_ONCE_INIT;

/* A real-time signal that neither glibc (the first two) nor Python uses. */
static int kick_signal(void)
{
	return SIGRTMIN + 5;
}

static void on_kick(int signal)
{
	(void)signal;
	if (this_vcpu && vcpu_must_stop(this_vcpu) && this_vcpu->vm->engine->kicked)
		this_vcpu->vm->engine->kicked(this_vcpu);
}

static void install_kick(void)
{
	/* Without SA_RESTART: KVM_RUN and a fault inside it must return EINTR. */
	struct sigaction action = {.sa_handler = on_kick};

	sigemptyset(&action.sa_mask);
	sigaction(kick_signal(), &action, NULL);
}

static const struct engine *engine_of(int guest)
{
	return guest == VMM_GUEST_PROCESS ? &vmm_process_engine : &vmm_kvm_engine;
}

void vcpu_guest_error(struct vcpu *vcpu, uint64_t page, uint32_t kind)
{
	uint64_t before = __atomic_load_n(&vcpu->guest_errors, __ATOMIC_RELAXED);

	if (before == 0) {
		vcpu->first_error_page = page;
		vcpu->first_error_kind = kind;
	}
	/* Release: who sees the count sees the first error. */
	__atomic_store_n(&vcpu->guest_errors, before + 1, __ATOMIC_RELEASE);
}

static bool await_release(struct vcpu *vcpu)
{
	struct vmm *vm = vcpu->vm;
	bool quit;

	pthread_mutex_lock(&vm->lock);
	while (vcpu->phase != VMM_VCPU_RUNNING && !vm->quit)
		pthread_cond_wait(&vm->changed, &vm->lock);
	quit = vm->quit;
	pthread_mutex_unlock(&vm->lock);
	return !quit;
}

static int phase_after(enum outcome outcome)
{
	switch (outcome) {
	case OUTCOME_DONE:
		return VMM_VCPU_DONE;
	case OUTCOME_FAILED:
		return VMM_VCPU_FAILED;
	default:
		return VMM_VCPU_PARKED;
	}
}

static void set_phase(struct vcpu *vcpu, int phase)
{
	pthread_mutex_lock(&vcpu->vm->lock);
	vcpu->phase = phase;
	pthread_cond_broadcast(&vcpu->vm->changed);
	pthread_mutex_unlock(&vcpu->vm->lock);
}

static void *vcpu_main(void *arg)
{
	struct vcpu *vcpu = arg;
	sigset_t kick;

	this_vcpu = vcpu;
	sigemptyset(&kick);
	sigaddset(&kick, kick_signal());
	pthread_sigmask(SIG_UNBLOCK, &kick, NULL);
	pthread_mutex_lock(&vcpu->vm->lock);
	vcpu->tid = gettid();
	pthread_cond_broadcast(&vcpu->vm->changed);
	pthread_mutex_unlock(&vcpu->vm->lock);

	while (await_release(vcpu))
		set_phase(vcpu, phase_after(vcpu->vm->engine->run(vcpu)));
	return NULL;
}

int vmm_shape_check(const struct vmm_shape *shape)
{
	if (shape->memory_bytes % VMM_PAGE || shape->memory_bytes > VMM_MAX_MEMORY ||
	    shape->spare_bytes % VMM_PAGE || shape->spare_bytes >= shape->memory_bytes)
		return -EINVAL;
	if (shape->vcpus < 1 || shape->vcpus > VMM_MAX_VCPUS || walk_pages(shape) < shape->vcpus)
		return -EINVAL;
	/* A tick counts passes above at most 26 bits of position. */
	if (shape->order > VMM_ORDER_RANDOM || shape->passes >> 32)
		return -EINVAL;
	return 0;
}

static int start_threads(struct vmm *vm)
{
	sigset_t all, before;
	int error = 0;

	/* The threads inherit the mask: signals for the process are never theirs. SIGBUS is how KVM tells a vCPU's thread of
	 * poisoned memory; blocked, it would only make KVM_RUN return over and over. */
	sigfillset(&all);
	sigdelset(&all, SIGBUS);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	for (; vm->threads < vm->shape.vcpus && !error; vm->threads += error == 0)
		error = pthread_create(&vm->vcpus[vm->threads].thread, NULL, vcpu_main, &vm->vcpus[vm->threads]);
	pthread_sigmask(SIG_SETMASK, &before, NULL);

	pthread_mutex_lock(&vm->lock);
	for (unsigned i = 0; i < vm->threads; i++)
		while (vm->vcpus[i].tid == 0)
			pthread_cond_wait(&vm->changed, &vm->lock);
	pthread_mutex_unlock(&vm->lock);
	return -error;
}

static void vmm_init_sync(struct vmm *vm)
{
	pthread_condattr_t attr;

	pthread_once(&kick_once, install_kick);
	pthread_mutex_init(&vm->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&vm->changed, &attr);
	pthread_condattr_destroy(&attr);
}

int vmm_create(const struct vmm_shape *shape, void *memory, int guest, struct vmm **out, const char **op)
{
	int error = vmm_shape_check(shape);
	struct vmm *vm = error ? NULL : calloc(1, sizeof(*vm));

	*out = NULL;
	*op = "shape";
	if (!vm)
		return error ? error : -ENOMEM;
	vm->shape = *shape;
	vm->memory = memory;
	vm->engine = engine_of(guest);
	vm->kvm_fd = vm->vm_fd = -1;
	vmm_init_sync(vm);
	vm->vcpus = calloc(shape->vcpus, sizeof(*vm->vcpus));
	if (!vm->vcpus) {
		vmm_destroy(vm);
		return -ENOMEM;
	}
	for (unsigned i = 0; i < shape->vcpus; i++) {
		vm->vcpus[i].vm = vm;
		vm->vcpus[i].index = i;
		vm->vcpus[i].fd = -1;
		vm->vcpus[i].slice = walk_slice_of(shape, i);
	}
	error = vm->engine->init(vm, op);
	if (!error) {
		*op = "pthread_create";
		error = start_threads(vm);
	}
	if (error) {
		vmm_destroy(vm);
		return error;
	}
	*out = vm;
	return 0;
}

/* Under lock. */
static void interrupt_running(struct vmm *vm)
{
	for (unsigned i = 0; i < vm->threads; i++) {
		struct vcpu *vcpu = &vm->vcpus[i];

		if (vcpu->phase != VMM_VCPU_RUNNING)
			continue;
		__atomic_store_n(&vcpu->stop, 1, __ATOMIC_RELEASE);
		if (vm->engine->interrupt)
			vm->engine->interrupt(vcpu);
		pthread_kill(vcpu->thread, kick_signal());
	}
}

void vmm_destroy(struct vmm *vm)
{
	if (!vm)
		return;
	pthread_mutex_lock(&vm->lock);
	vm->quit = true;
	interrupt_running(vm);
	pthread_cond_broadcast(&vm->changed);
	pthread_mutex_unlock(&vm->lock);
	for (unsigned i = 0; i < vm->threads; i++)
		pthread_join(vm->vcpus[i].thread, NULL);
	if (vm->vcpus)
		vm->engine->deinit(vm);
	pthread_cond_destroy(&vm->changed);
	pthread_mutex_destroy(&vm->lock);
	free(vm->vcpus);
	free(vm);
}

void vmm_start(struct vmm *vm)
{
	pthread_mutex_lock(&vm->lock);
	for (unsigned i = 0; i < vm->shape.vcpus; i++) {
		struct vcpu *vcpu = &vm->vcpus[i];

		if (vcpu->phase != VMM_VCPU_PARKED)
			continue;
		__atomic_store_n(&vcpu->stop, 0, __ATOMIC_RELEASE);
		if (vm->engine->release)
			vm->engine->release(vcpu);
		vcpu->phase = VMM_VCPU_RUNNING;
	}
	pthread_cond_broadcast(&vm->changed);
	pthread_mutex_unlock(&vm->lock);
}

static int count_running(const struct vmm *vm)
{
	int running = 0;

	for (unsigned i = 0; i < vm->shape.vcpus; i++)
		running += vm->vcpus[i].phase == VMM_VCPU_RUNNING;
	return running;
}

/* Under lock. */
static int wait_stopped(struct vmm *vm, unsigned timeout_ms)
{
	struct timespec deadline;
	int running;

	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_sec += timeout_ms / 1000;
	deadline.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (deadline.tv_nsec >= 1000000000) {
		deadline.tv_sec++;
		deadline.tv_nsec -= 1000000000;
	}
	while ((running = count_running(vm)) > 0)
		if (pthread_cond_timedwait(&vm->changed, &vm->lock, &deadline) == ETIMEDOUT)
			return count_running(vm);
	return running;
}

int vmm_pause(struct vmm *vm, unsigned timeout_ms)
{
	int running;

	pthread_mutex_lock(&vm->lock);
	interrupt_running(vm);
	running = wait_stopped(vm, timeout_ms);
	pthread_mutex_unlock(&vm->lock);
	return running;
}

int vmm_wait(struct vmm *vm, unsigned timeout_ms)
{
	int running;

	pthread_mutex_lock(&vm->lock);
	running = wait_stopped(vm, timeout_ms);
	pthread_mutex_unlock(&vm->lock);
	return running;
}

void vmm_status(struct vmm *vm, unsigned index, struct vmm_vcpu_status *status)
{
	struct vcpu *vcpu = &vm->vcpus[index];

	memset(status, 0, sizeof(*status));
	pthread_mutex_lock(&vm->lock);
	status->phase = (uint32_t)vcpu->phase;
	status->tid = vcpu->tid;
	if (vcpu->phase == VMM_VCPU_FAILED) {
		status->run_errno = vcpu->run_errno;
		status->exit_reason = vcpu->exit_reason;
		status->suberror = vcpu->suberror;
		status->rip = vcpu->rip;
	}
	pthread_mutex_unlock(&vm->lock);
	status->tick = vm->engine->progress(vcpu);
	status->passes = walk_pass(&vcpu->slice, status->tick);
	status->guest_errors = __atomic_load_n(&vcpu->guest_errors, __ATOMIC_ACQUIRE);
	if (status->guest_errors) {
		status->first_error_page = vcpu->first_error_page;
		status->first_error_kind = vcpu->first_error_kind;
	}
}

size_t vmm_state_bytes(int guest)
{
	return engine_of(guest)->state_bytes;
}

int vmm_save(struct vmm *vm, unsigned vcpu, uint8_t *state)
{
	int error = -EBUSY;

	pthread_mutex_lock(&vm->lock);
	if (vm->vcpus[vcpu].phase != VMM_VCPU_RUNNING)
		error = vm->engine->save(&vm->vcpus[vcpu], state);
	pthread_mutex_unlock(&vm->lock);
	return error;
}

int vmm_load(struct vmm *vm, unsigned vcpu, const uint8_t *state)
{
	int error = -EBUSY;

	pthread_mutex_lock(&vm->lock);
	if (vm->vcpus[vcpu].phase != VMM_VCPU_RUNNING) {
		error = vm->engine->load(&vm->vcpus[vcpu], state);
		if (!error)
			vm->vcpus[vcpu].phase = VMM_VCPU_PARKED;
	}
	pthread_mutex_unlock(&vm->lock);
	return error;
}

void vmm_state_walk(int guest, const uint8_t *state, struct vmm_walk *walk)
{
	engine_of(guest)->state_walk(state, walk);
}

uint64_t vmm_program_id(int guest)
{
	return engine_of(guest)->program_id();
}
