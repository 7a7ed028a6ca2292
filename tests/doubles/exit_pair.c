/*
 * Both ends of an exit ring in one process, as a shared library for the Python tests: each call is one step of one side.
 */
#include <stdlib.h>
#include <string.h>

#include "exit_ring.h"
#include "exit_ring_vmm.h"

struct exit_pair {
	void *mem;
	size_t len;
	struct exit_ring_end vmm;
	struct exit_ring ring;
	uint32_t vcpus;
	struct exit_lane_end lane[];
};

/* Indices of all lanes begin at `start`, so that tests can come near the end of 32 bits. */
struct exit_pair *pair_new(uint32_t vcpus, uint32_t start);
struct exit_pair *pair_new(uint32_t vcpus, uint32_t start)
{
	struct exit_pair *pair = calloc(1, sizeof(*pair) + vcpus * sizeof(pair->lane[0]));

	pair->vcpus = vcpus;
	pair->len = exit_ring_bytes(vcpus, 0);
	pair->mem = aligned_alloc(4096, pair->len);
	memset(pair->mem, 0, pair->len);
	exit_ring_format(&pair->vmm, pair->mem, vcpus, 0, false);
	for (uint32_t i = 0; i < vcpus; i++) {
		exit_lane_init(&pair->lane[i], &pair->vmm, i);
		pair->lane[i].sequence = start;
		pair->lane[i].lane->fault_head = pair->lane[i].lane->done_head = pair->lane[i].lane->done_tail = start;
	}
	return exit_ring_attach(&pair->ring, pair->mem, pair->len) ? NULL : pair;
}

void pair_free(struct exit_pair *pair);
void pair_free(struct exit_pair *pair)
{
	exit_ring_detach(&pair->ring);
	free(pair->mem);
	free(pair);
}

/* The daemon dies and another one takes over. */
int pair_restart(struct exit_pair *pair);
int pair_restart(struct exit_pair *pair)
{
	exit_ring_detach(&pair->ring);
	return exit_ring_attach(&pair->ring, pair->mem, pair->len);
}

int pair_post(struct exit_pair *pair, uint32_t vcpu, const uint64_t *gpa, uint32_t count);
int pair_post(struct exit_pair *pair, uint32_t vcpu, const uint64_t *gpa, uint32_t count)
{
	return exit_lane_post(&pair->lane[vcpu], gpa, count, 0);
}

int pair_collect(struct exit_pair *pair, uint32_t vcpu);
int pair_collect(struct exit_pair *pair, uint32_t vcpu)
{
	return (int)exit_lane_collect(&pair->lane[vcpu]);
}

/* Faults as vcpu, gpa, sequence; their number, or an error. */
int pair_drain(struct exit_pair *pair, uint64_t (*out)[3], unsigned max);
int pair_drain(struct exit_pair *pair, uint64_t (*out)[3], unsigned max)
{
	struct exit_fault fault[64];
	unsigned count;
	int error = exit_ring_drain(&pair->ring, fault, max < 64 ? max : 64, &count);

	for (unsigned i = 0; i < count; i++) {
		out[i][0] = fault[i].vcpu;
		out[i][1] = fault[i].gpa;
		out[i][2] = fault[i].sequence;
	}
	return error ? error : (int)count;
}

int pair_complete(struct exit_pair *pair, uint32_t vcpu, uint64_t gpa, uint64_t sequence, uint32_t status);
int pair_complete(struct exit_pair *pair, uint32_t vcpu, uint64_t gpa, uint64_t sequence, uint32_t status)
{
	return exit_ring_complete(&pair->ring, vcpu, gpa, sequence, status);
}

int pair_arm(struct exit_pair *pair);
int pair_arm(struct exit_pair *pair)
{
	return exit_ring_arm(&pair->ring);
}
