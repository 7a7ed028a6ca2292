// sources: exit_ring.c exit_ring_map.c exit_ring_vmm.c
// libs: -pthread
/*
 * A VMM and a daemon on one ring, as fast as they can, with random stalls and signals; nothing may get lost or come twice.
 *
 * usage: test_exit_ring_stress [processes|threads [FAULTS_A_VCPU]]. As threads of one process it is what ThreadSanitizer can watch.
 * A lost wake-up is a hang, which the test's time-out reports.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "exit_ring.h"
#include "exit_ring_vmm.h"

#define VCPUS 4u
#define HELD_MAX 64u
#define DRAIN_MAX 7u /* less than a lane can hold, so that batches are cut */

static struct exit_ring_end vmm;
static int ring_fd, doorbell;
static uint64_t faults_a_vcpu = 500000;

/* What a fault asks for follows from its vCPU and number, so that both sides know what must come next. */
static uint64_t gpa_of(uint32_t vcpu, uint64_t sequence)
{
	return ((uint64_t)vcpu << 40 | (sequence & 0xffffffffu)) << 12;
}

static void stall(uint64_t *seed)
{
	uint64_t chance = next_random(seed) % 4096;

	if (chance == 0)
		usleep(next_random(seed) % 200);
	else if (chance < 64)
		sched_yield();
}

/* --- the daemon: keeps answers back at random and gives them in any order ------------------------------------------- */

struct server {
	struct exit_ring ring;
	struct exit_fault held[HELD_MAX];
	unsigned count;
	uint64_t next[VCPUS]; /* the sequence that must come next */
	uint64_t done;
	uint64_t seed;
};

static void answer_one(struct server *server)
{
	unsigned at = (unsigned)(next_random(&server->seed) % server->count);
	struct exit_fault fault = server->held[at];

	server->held[at] = server->held[--server->count];
	CHECK_EQ(exit_ring_complete(&server->ring, fault.vcpu, fault.gpa, fault.sequence, EXIT_RESOLVED), EXIT_RING_OK);
	server->done++;
}

static void take(struct server *server, const struct exit_fault *fault)
{
	CHECK(fault->vcpu < VCPUS);
	CHECK_EQ(fault->sequence, server->next[fault->vcpu]);
	CHECK_EQ(fault->gpa, gpa_of(fault->vcpu, fault->sequence));
	server->next[fault->vcpu]++;
	server->held[server->count++] = *fault;
}

static void serve(struct server *server)
{
	struct pollfd entry = { .fd = doorbell, .events = POLLIN };

	while (server->done < VCPUS * faults_a_vcpu) {
		struct exit_fault fault[DRAIN_MAX];
		unsigned count;

		CHECK_EQ(exit_ring_drain(&server->ring, fault, DRAIN_MAX, &count), EXIT_RING_OK);
		for (unsigned i = 0; i < count; i++)
			take(server, &fault[i]);
		stall(&server->seed);
		/* All of them when there is nothing else to do: a vCPU waits for its last one. */
		while (server->count && (!count || next_random(&server->seed) % 3 || server->count > HELD_MAX - DRAIN_MAX))
			answer_one(server);
		if (!count && exit_ring_arm(&server->ring)) {
			while (server->done < VCPUS * faults_a_vcpu && poll(&entry, 1, -1) < 0)
				CHECK_EQ(errno, EINTR);
			CHECK(exit_ring_quiet(doorbell));
		}
	}
	CHECK_EQ(server->done, VCPUS * faults_a_vcpu);
}

static void *daemon_side(void *argument)
{
	struct server *server = calloc(1, sizeof(*server));
	void *mem = argument;
	size_t len = exit_ring_bytes(VCPUS, 0);

	CHECK(server);
	server->seed = 4711;
	/* ThreadSanitizer goes by addresses: the threads must use one mapping. */
	if (!mem)
		CHECK_EQ(exit_ring_map(ring_fd, &mem, &len), EXIT_RING_OK);
	CHECK_EQ(exit_ring_attach(&server->ring, mem, len), EXIT_RING_OK);
	serve(server);
	exit_ring_detach(&server->ring);
	if (!argument)
		exit_ring_unmap(mem, len);
	free(server);
	return NULL;
}

/* --- vCPUs ------------------------------------------------------------------------------------------------------- */

static void wait_for_answers(struct exit_lane_end *lane)
{
	enum exit_lane_state state;

	while ((state = exit_lane_collect(lane)) == EXIT_LANE_WAITING) {
		uint32_t word = exit_lane_doze(lane);

		if (!exit_lane_has_news(lane) && syscall(SYS_futex, &lane->lane->wake, FUTEX_WAIT, word, NULL, NULL, 0) < 0)
			CHECK(errno == EINTR || errno == EAGAIN);
		exit_lane_rouse(lane);
	}
	CHECK_EQ(state, EXIT_LANE_IDLE);
}

static void *vcpu_side(void *argument)
{
	uint32_t vcpu = (uint32_t)(uintptr_t)argument;
	uint64_t seed = vcpu + 1, one = 1, posted = 0;
	struct exit_lane_end lane;

	exit_lane_init(&lane, &vmm, vcpu);
	while (posted < faults_a_vcpu) {
		uint64_t gpa[EXIT_RING_ENTRIES], left = faults_a_vcpu - posted;
		uint32_t count = (uint32_t)(next_random(&seed) % EXIT_RING_ENTRIES) + 1;

		if (count > left)
			count = (uint32_t)left;
		for (uint32_t i = 0; i < count; i++)
			gpa[i] = gpa_of(vcpu, posted + i);
		if (exit_lane_post(&lane, gpa, count, 0))
			CHECK_EQ(write(doorbell, &one, sizeof(one)), sizeof(one));
		posted += count;
		stall(&seed);
		wait_for_answers(&lane);
	}
	CHECK_EQ(lane.sequence, faults_a_vcpu);
	return NULL;
}

static void on_signal(int number)
{
	(void)number;
}

/* Interrupt whoever it hits, about a thousand times a second. */
static void start_signals(void)
{
	const struct sigaction action = { .sa_handler = on_signal };
	const struct itimerval often = { { 0, 1000 }, { 0, 1000 } };

	CHECK_EQ(sigaction(SIGALRM, &action, NULL), 0);
	CHECK_EQ(setitimer(ITIMER_REAL, &often, NULL), 0);
}

static void make_ring(void)
{
	uint64_t len = exit_ring_bytes(VCPUS, 0);
	void *mem;

	ring_fd = memfd_create("ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	CHECK_EQ(ftruncate(ring_fd, (off_t)len), 0);
	CHECK_EQ(fcntl(ring_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), 0);
	mem = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, ring_fd, 0);
	CHECK(mem != MAP_FAILED);
	exit_ring_format(&vmm, mem, VCPUS, 0, false);
	doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

int main(int argc, char **argv)
{
	bool threads = argc > 1 && !strcmp(argv[1], "threads");
	pthread_t vcpu[VCPUS], server;
	pid_t child = 0;
	int status = 0;

	if (argc > 2)
		faults_a_vcpu = strtoull(argv[2], NULL, 10);
	make_ring();
	if (threads) {
		CHECK_EQ(pthread_create(&server, NULL, daemon_side, vmm.header), 0);
	} else if ((child = fork()) == 0) {
		start_signals();
		daemon_side(NULL);
		return 0;
	}
	start_signals();
	for (uintptr_t i = 0; i < VCPUS; i++)
		CHECK_EQ(pthread_create(&vcpu[i], NULL, vcpu_side, (void *)i), 0);
	for (uintptr_t i = 0; i < VCPUS; i++)
		CHECK_EQ(pthread_join(vcpu[i], NULL), 0);
	if (threads) {
		CHECK_EQ(pthread_join(server, NULL), 0);
	} else {
		while (waitpid(child, &status, 0) < 0)
			CHECK_EQ(errno, EINTR);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	}
	return 0;
}
