/*
 * The guest as plain threads, for hosts without /dev/kvm: the same walk over the same content, its page faults taken
 * by the process itself.
 *
 * A thread that waits for a page in user mode is woken by a signal only to fault again when the handler returns, so
 * the handler jumps out instead. That is exact because only the two loads of a visit may wait: they change nothing,
 * and the store that follows finds the page present. (A page discarded between the loads and the store is waited for
 * by the store, and the thread parks when it comes.)
 */
#include <string.h>

#include "vmm_machine.h"

static int process_init(struct vmm *vm, const char **op)
{
	(void)vm;
	(void)op;
	return 0;
}

static void process_deinit(struct vmm *vm)
{
	(void)vm;
}

static void process_kicked(struct vcpu *vcpu)
{
	if (vcpu->touching)
		siglongjmp(vcpu->escape, 1);
}

/* False: the vCPU must stop, and has not touched the page. */
static bool visit(struct vcpu *vcpu, uint64_t position, uint64_t hash)
{
	uint64_t page = vcpu->slice.first + position;
	volatile uint64_t *words = (volatile uint64_t *)(vcpu->vm->memory + page * VMM_PAGE);
	uint64_t expected = walk_pass(&vcpu->slice, vcpu->tick);
	uint64_t id, counter;

	/* `touching` before the look at `stop`: a kick either comes before that look, or finds touching set. */
	vcpu->touching = 1;
	if (vcpu_must_stop(vcpu)) {
		vcpu->touching = 0;
		return false;
	}
	id = words[0];
	counter = words[1];
	vcpu->touching = 0;

	if (id != hash)
		vcpu_guest_error(vcpu, page, VMM_WRONG_ID);
	else if (counter != expected)
		vcpu_guest_error(vcpu, page, VMM_WRONG_COUNTER);
	words[1] = counter + 1;
	return true;
}

static enum outcome process_run(struct vcpu *vcpu)
{
	const struct walk_slice *slice = &vcpu->slice;
	uint64_t limit = walk_limit(&vcpu->vm->shape, slice);

	if (sigsetjmp(vcpu->escape, 1)) {
		vcpu->touching = 0;
		return OUTCOME_PARK;
	}
	while (vcpu->tick < limit) {
		uint64_t position = walk_position(slice, vcpu->tick);

		if (vcpu_must_stop(vcpu))
			return OUTCOME_PARK;
		if (position < slice->pages) {
			uint64_t hash = walk_hash(slice->first + position, vcpu->vm->shape.seed);

			if (walk_kind_of(hash) == WALK_COUNTER && !visit(vcpu, position, hash))
				return OUTCOME_PARK;
		}
		vcpu->tick++;
	}
	return OUTCOME_DONE;
}

static uint64_t process_progress(const struct vcpu *vcpu)
{
	return vcpu->tick;
}

static int process_save(struct vcpu *vcpu, uint8_t *state)
{
	uint64_t tick = vcpu->tick;

	memcpy(state, &tick, sizeof(tick));
	return 0;
}

static int process_load(struct vcpu *vcpu, const uint8_t *state)
{
	uint64_t tick;

	memcpy(&tick, state, sizeof(tick));
	vcpu->tick = tick;
	return 0;
}

static void process_state_walk(const uint8_t *state, struct vmm_walk *walk)
{
	memcpy(&walk->tick, state, sizeof(walk->tick));
	walk->visited = 0;
}

static uint64_t process_program_id(void)
{
	return 0;
}

const struct engine vmm_process_engine = {
	.init = process_init,
	.deinit = process_deinit,
	.run = process_run,
	.kicked = process_kicked,
	.progress = process_progress,
	.state_bytes = sizeof(uint64_t),
	.save = process_save,
	.load = process_load,
	.state_walk = process_state_walk,
	.program_id = process_program_id,
};
