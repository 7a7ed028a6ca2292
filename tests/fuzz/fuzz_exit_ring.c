/*
 * libFuzzer target: a VMM that writes whatever it likes into its ring, between and before the daemon's calls.
 *
 * The input is a list of 16-byte steps: what to do, where, and a value. Whatever they are, the daemon stays within the ring,
 * reports each vCPU's faults within bounds, and never completes what it did not take. AddressSanitizer watches the rest.
 *
 *	clang -g -O1 -fsanitize=fuzzer,address,undefined -Idaemon/native tests/fuzz/fuzz_exit_ring.c \
 *		daemon/native/exit_ring.c daemon/native/exit_ring_vmm.c -o fuzz_exit_ring
 */
#include <stdlib.h>
#include <string.h>

#include "exit_ring.h"
#include "exit_ring_vmm.h"

#define VCPUS 3u
#define PAGES 100u
#define DRAIN_MAX 20u
#define HELD_MAX (VCPUS * EXIT_RING_ENTRIES)

enum step_kind { WRITE_ANYWHERE, WRITE_INDEX, WRITE_FAULT, POST, DRAIN, COMPLETE, ARM, MARK, RESTART, COLLECT, STEP_KINDS };

struct step {
	uint8_t kind, vcpu, slot, width;
	uint32_t where;
	uint64_t value;
};

struct game {
	uint8_t *mem;
	size_t len;
	struct exit_ring_end vmm;
	struct exit_lane_end lane[VCPUS];
	struct exit_ring ring;
	bool attached;
	struct exit_fault held[HELD_MAX];
	unsigned count;
};

#define MUST(condition)          \
	do {                     \
		if (!(condition)) \
			abort();  \
	} while (0)

static void write_value(uint8_t *at, const struct step *step)
{
	static const unsigned widths[] = { 1, 2, 4, 8 };

	memcpy(at, &step->value, widths[step->width % 4]);
}

static void restart(struct game *game)
{
	if (game->attached)
		exit_ring_detach(&game->ring);
	game->count = 0;
	game->attached = exit_ring_attach(&game->ring, game->mem, game->len) == EXIT_RING_OK;
}

static void drain(struct game *game)
{
	unsigned room = HELD_MAX - game->count, count;
	int error = exit_ring_drain(&game->ring, game->held + game->count, room < DRAIN_MAX ? room : DRAIN_MAX, &count);

	MUST(count <= room);
	for (unsigned i = game->count; i < game->count + count; i++) {
		MUST(game->held[i].vcpu < VCPUS);
		MUST(game->held[i].gpa % 4096 == 0);
		MUST(!(game->held[i].flags & ~EXIT_FAULT_FLAGS));
	}
	game->count += count;
	if (error) {
		exit_ring_detach(&game->ring);
		game->attached = false;
	}
}

static void complete(struct game *game, const struct step *step)
{
	const struct exit_fault *fault;

	if (!game->count)
		return;
	/* What was taken can be completed, once, whatever the VMM did since. */
	fault = &game->held[step->where % game->count];
	MUST(exit_ring_complete(&game->ring, fault->vcpu, fault->gpa, fault->sequence, step->slot % EXIT_STATUSES) ==
	     EXIT_RING_OK);
	MUST(exit_ring_complete(&game->ring, fault->vcpu, fault->gpa, fault->sequence, 0) == EXIT_RING_NOT_OWED);
	game->held[step->where % game->count] = game->held[game->count - 1];
	game->count--;
}

static void post(struct game *game, const struct step *step)
{
	struct exit_lane_end *lane = &game->lane[step->vcpu % VCPUS];
	uint64_t gpa[EXIT_RING_ENTRIES];
	uint32_t count = step->slot % EXIT_RING_ENTRIES + 1;

	for (uint32_t i = 0; i < count; i++)
		gpa[i] = (step->value + i) << 12;
	if (!lane->count)
		exit_lane_post(lane, gpa, count, step->width & EXIT_FAULT_FLAGS);
}

static void write_lane(struct game *game, const struct step *step)
{
	struct exit_ring_lane *lane = game->lane[step->vcpu % VCPUS].lane;
	uint32_t *const index[] = { &lane->fault_head, &lane->done_tail, &lane->fault_tail, &lane->done_head, &lane->sleeping };

	if (step->kind % STEP_KINDS == WRITE_INDEX)
		*index[step->slot % 5] = (uint32_t)step->value;
	else
		write_value((uint8_t *)&lane->fault[step->slot % EXIT_RING_ENTRIES] + step->where % 25, step);
	game->vmm.header->pending[0] |= 1u << step->vcpu % VCPUS;
}

static void play(struct game *game, const struct step *step)
{
	switch (step->kind % STEP_KINDS) {
	case WRITE_ANYWHERE:
		write_value(game->mem + step->where % (game->len - 8), step);
		break;
	case WRITE_INDEX:
	case WRITE_FAULT:
		write_lane(game, step);
		break;
	case POST:
		post(game, step);
		break;
	case COLLECT:
		exit_lane_collect(&game->lane[step->vcpu % VCPUS]);
		break;
	case RESTART:
		restart(game);
		break;
	default:
		if (!game->attached)
			return;
		if (step->kind % STEP_KINDS == DRAIN)
			drain(game);
		else if (step->kind % STEP_KINDS == COMPLETE)
			complete(game, step);
		else if (step->kind % STEP_KINDS == ARM)
			exit_ring_arm(&game->ring);
		else
			exit_ring_mark(&game->ring, step->where, step->value, step->width & 1);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct game *game = calloc(1, sizeof(*game));

	game->len = exit_ring_bytes(VCPUS, PAGES);
	game->mem = aligned_alloc(4096, game->len);
	memset(game->mem, 0, game->len);
	exit_ring_format(&game->vmm, game->mem, VCPUS, PAGES, false);
	for (uint32_t i = 0; i < VCPUS; i++)
		exit_lane_init(&game->lane[i], &game->vmm, i);
	restart(game);
	for (size_t at = 0; at + sizeof(struct step) <= size; at += sizeof(struct step)) {
		struct step step;

		memcpy(&step, data + at, sizeof(step));
		play(game, &step);
	}
	if (game->attached)
		exit_ring_detach(&game->ring);
	free(game->mem);
	free(game);
	return 0;
}
