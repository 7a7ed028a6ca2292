// sources: ../libpostcopy/wait.c ../libpostcopy/local.c ../libpostcopy/connect.c ../libpostcopy/attach.c ../libpostcopy/message.c ../libpostcopy/watch.c ../libpostcopy/memory.c ../libpostcopy/adapt.c ../libpostcopy/resolve.c ../libpostcopy/walk.c ../libpostcopy/operands.c ../libpostcopy/stack.c ../libpostcopy/registers.c ../libpostcopy/guard.c ../libpostcopy/mmio.c exit_ring.c exit_ring_map.c exit_ring_vmm.c ../../tests/doubles/exit_daemon.c
// libs: -lcapstone -pthread -Wl,--wrap=ioctl
#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../../daemon/libpostcopy/handle.h"
#include "../doubles/exit_daemon.h"
#include "check.h"

/* Only the registers are asked of the kernel here, and they do not matter. */
int __wrap_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...)
{
	(void)fd;
	CHECK(request == KVM_GET_REGS || request == KVM_GET_SREGS);
	return 0;
}

#define PAGES 64u
#define PARKED_GPA (40u << 12) /* a page that the daemon does not answer for */

static uint8_t memory[PAGES << 12] __attribute__((aligned(4096)));
static const struct postcopy_region region = {
	.gpa = 0, .size = sizeof(memory), .image_offset = 1 << 20, .page_size = 4096
};
static char path[64];

static struct {
	struct exit_daemon daemon;
	uint32_t answered[PAGES];
	int held_fd; /* readable when a fault is held */
	bool hold_nothing;
} peer;

static int answer(struct exit_daemon *daemon, const struct exit_fault *fault)
{
	uint64_t one = 1;

	if (fault->gpa == PARKED_GPA && !peer.hold_nothing) {
		CHECK_EQ(write(peer.held_fd, &one, sizeof(one)), sizeof(one));
		return EXIT_DAEMON_HOLD;
	}
	__atomic_fetch_add(&peer.answered[fault->gpa >> 12], 1, __ATOMIC_RELAXED);
	exit_ring_mark(&daemon->ring, (region.image_offset + fault->gpa) >> 12, 1, true);
	return EXIT_RESOLVED;
}

static void wait_until_held(void)
{
	uint64_t count;

	CHECK_EQ(read(peer.held_fd, &count, sizeof(count)), sizeof(count));
}

static struct postcopy_config config(struct postcopy_region *copy)
{
	*copy = region;
	copy->hva = (uintptr_t)memory;
	return (struct postcopy_config){
		.config_size = sizeof(struct postcopy_config), .uffd = peer.held_fd, .vcpus = 2, .regions = copy, .region_count = 1
	};
}

static struct postcopy *begin_pinned(const struct postcopy_range *pinned, size_t count)
{
	struct postcopy_region copy;
	struct postcopy_config wanted;
	struct postcopy *pc;

	memset(&peer, 0, sizeof(peer));
	peer.held_fd = eventfd(0, EFD_CLOEXEC);
	peer.daemon.path = path;
	peer.daemon.resolve = answer;
	exit_daemon_start(&peer.daemon);
	wanted = config(&copy);
	wanted.pinned = pinned;
	wanted.pinned_count = count;
	CHECK_EQ(postcopy_connect(path, &wanted, &pc), 0);
	exit_daemon_wait_attached(&peer.daemon);
	return pc;
}

static struct postcopy *begin(void)
{
	return begin_pinned(NULL, 0);
}

static void end(struct postcopy *pc)
{
	exit_daemon_crash(&peer.daemon);
	postcopy_close(pc);
	close(peer.held_fd);
}

/* An annotated exit for pages from `gpa` on. */
static enum postcopy_action fault_on(struct postcopy *pc, uint32_t vcpu, uint64_t gpa, uint64_t size)
{
	struct kvm_run run = { .exit_reason = 39 };
	uint64_t fault[3] = { 0, gpa, size };
	struct postcopy_exit exit = { .ret = -1, .error = EFAULT, .vcpu_fd = -1, .run = &run };
	struct postcopy_answer answer;

	memcpy(run.padding, fault, sizeof(fault));
	return postcopy_adapt(pc, vcpu, &exit, &answer);
}

static void a_vcpu_resumes_after_the_last_of_its_pages(void)
{
	struct postcopy *pc = begin();

	CHECK_EQ(fault_on(pc, 1, 5 << 12, 3 << 12), POSTCOPY_WAIT);
	CHECK_EQ(postcopy_wait(pc, 1), POSTCOPY_RESUMED);
	for (unsigned page = 5; page < 8; page++) {
		CHECK_EQ(peer.answered[page], 1);
		CHECK(!postcopy_is_missing(pc, page << 12));
	}
	CHECK_EQ(fault_on(pc, 1, 5 << 12, 3 << 12), POSTCOPY_RUN_AGAIN);
	CHECK_EQ(postcopy_wait(pc, 1), POSTCOPY_RESUMED);
	end(pc);
}

struct waiter {
	struct postcopy *pc;
	enum postcopy_wait result;
	pthread_t thread;
};

static void *wait_for_parked(void *argument)
{
	struct waiter *waiter = argument;

	CHECK_EQ(fault_on(waiter->pc, 0, PARKED_GPA, 4096), POSTCOPY_WAIT);
	waiter->result = postcopy_wait(waiter->pc, 0);
	return NULL;
}

static void start_waiter(struct waiter *waiter, struct postcopy *pc)
{
	waiter->pc = pc;
	CHECK_EQ(pthread_create(&waiter->thread, NULL, wait_for_parked, waiter), 0);
	wait_until_held();
}

/* A hang is what the test's time-out reports. */
static void a_kick_ends_a_wait_that_nobody_answers(void)
{
	struct postcopy *pc = begin();
	struct waiter waiter;

	start_waiter(&waiter, pc);
	postcopy_kick(pc, 0);
	pthread_join(waiter.thread, NULL);
	CHECK_EQ(waiter.result, POSTCOPY_INTERRUPTED);
	/* A kick before the wait counts too: whoever kicks cannot know. */
	postcopy_kick(pc, 0);
	CHECK_EQ(postcopy_wait(pc, 0), POSTCOPY_INTERRUPTED);
	end(pc);
}

static void on_signal(int number)
{
	(void)number;
}

/* The vCPU is asleep when the word says so and it is in its futex; until then a signal may come too early. */
static void a_signal_ends_a_wait_whatever_its_handlers_flags(void)
{
	static const int flags[] = { 0, SA_RESTART };

	for (int i = 0; i < 2; i++) {
		const struct sigaction action = { .sa_handler = on_signal, .sa_flags = flags[i] };
		struct postcopy *pc = begin();
		struct waiter waiter;
		struct timespec now;

		CHECK_EQ(sigaction(SIGUSR1, &action, NULL), 0);
		start_waiter(&waiter, pc);
		do {
			pthread_kill(waiter.thread, SIGUSR1);
			clock_gettime(CLOCK_REALTIME, &now);
			now.tv_nsec += 1000000;
			if (now.tv_nsec >= 1000000000) {
				now.tv_sec++;
				now.tv_nsec -= 1000000000;
			}
		} while (pthread_timedjoin_np(waiter.thread, NULL, &now) == ETIMEDOUT);
		CHECK_EQ(waiter.result, POSTCOPY_INTERRUPTED);
		end(pc);
	}
}

static void an_interrupted_wait_goes_on_without_asking_again(void)
{
	struct postcopy *pc = begin();
	struct exit_lane_end before;

	CHECK_EQ(fault_on(pc, 0, PARKED_GPA, 4096), POSTCOPY_WAIT);
	postcopy_kick(pc, 0);
	CHECK_EQ(postcopy_wait(pc, 0), POSTCOPY_INTERRUPTED);
	wait_until_held();
	before = pc->vcpu[0].lane;
	postcopy_kick(pc, 0);
	CHECK_EQ(postcopy_wait(pc, 0), POSTCOPY_INTERRUPTED);
	CHECK_EQ(pc->vcpu[0].lane.lane->fault_head, 1);
	CHECK_EQ(pc->vcpu[0].lane.sequence, before.sequence);
	end(pc);
}

static void what_a_dead_daemon_owed_the_next_one_gives(void)
{
	struct postcopy *pc = begin();

	CHECK_EQ(fault_on(pc, 0, PARKED_GPA - 4096, 8192), POSTCOPY_WAIT);
	postcopy_kick(pc, 0);
	CHECK_EQ(postcopy_wait(pc, 0), POSTCOPY_INTERRUPTED);
	wait_until_held();
	exit_daemon_crash(&peer.daemon);
	peer.hold_nothing = true;
	exit_daemon_start(&peer.daemon);
	CHECK_EQ(postcopy_reattach(pc), 0);
	CHECK_EQ(postcopy_wait(pc, 0), POSTCOPY_RESUMED);
	CHECK_EQ(peer.answered[PARKED_GPA >> 12], 1);
	CHECK_EQ(peer.answered[(PARKED_GPA >> 12) - 1], 1);
	end(pc);
}

static void *watch(void *pc)
{
	return (void *)(intptr_t)postcopy_watch(pc);
}

static void a_watch_hands_over_again_until_told_complete(void)
{
	struct postcopy *pc = begin();
	pthread_t watcher;
	void *result;

	CHECK_EQ(pthread_create(&watcher, NULL, watch, pc), 0);
	for (int restart = 0; restart < 3; restart++) {
		exit_daemon_crash(&peer.daemon);
		exit_daemon_start(&peer.daemon);
		exit_daemon_wait_attached(&peer.daemon);
	}
	CHECK_EQ(fault_on(pc, 1, 0, 4096), POSTCOPY_WAIT);
	CHECK_EQ(postcopy_wait(pc, 1), POSTCOPY_RESUMED);
	CHECK(!postcopy_is_complete(pc));
	exit_daemon_finish(&peer.daemon);
	CHECK_EQ(pthread_join(watcher, &result), 0);
	CHECK_EQ((intptr_t)result, 0);
	CHECK(postcopy_is_complete(pc));
	CHECK(!postcopy_is_missing(pc, PARKED_GPA));
	postcopy_close(pc);
	close(peer.held_fd);
}

static void a_watch_can_be_stopped(void)
{
	struct postcopy *pc = begin();
	pthread_t watcher;
	void *result;

	CHECK_EQ(pthread_create(&watcher, NULL, watch, pc), 0);
	exit_daemon_crash(&peer.daemon);
	unlink(path);
	postcopy_stop_watch(pc);
	CHECK_EQ(pthread_join(watcher, &result), 0);
	CHECK_EQ((intptr_t)result, -ECANCELED);
	postcopy_close(pc);
	close(peer.held_fd);
}

/* A page posted after the daemon's last look is in place all the same. */
static void the_end_wakes_who_still_waits(void)
{
	struct postcopy *pc = begin();
	struct waiter waiter;

	start_waiter(&waiter, pc);
	exit_daemon_finish(&peer.daemon);
	pthread_join(waiter.thread, NULL);
	CHECK_EQ(waiter.result, POSTCOPY_RESUMED);
	CHECK_EQ(fault_on(pc, 0, PARKED_GPA, 4096), POSTCOPY_RUN_AGAIN);
	postcopy_close(pc);
	close(peer.held_fd);
}

static void the_pinned_set_is_populated_and_nothing_else(void)
{
	const struct postcopy_range pinned[] = { { 3 << 12, 20 << 12 }, { (50 << 12) + 100, 4096 } };
	struct postcopy *pc = begin_pinned(pinned, 2);

	postcopy_kick(pc, 0);
	CHECK_EQ(postcopy_populate(pc, 0), POSTCOPY_INTERRUPTED);
	CHECK_EQ(postcopy_populate(pc, 0), POSTCOPY_RESUMED);
	for (uint64_t page = 0; page < PAGES; page++)
		CHECK_EQ(peer.answered[page], (page >= 3 && page < 23) || page == 50 || page == 51);
	CHECK_EQ(postcopy_populate(pc, 0), POSTCOPY_RESUMED);
	CHECK(strstr(peer.daemon.message, "\"pinned\":[{\"gpa\":12288,\"size\":81920},{\"gpa\":204900,\"size\":4096}]"));
	end(pc);
}

static int try_connect(struct postcopy_config wanted)
{
	struct postcopy *pc;

	return postcopy_connect(path, &wanted, &pc);
}

static void a_config_that_makes_no_sense_is_refused(void)
{
	const struct postcopy_range outside = { 63 << 12, 8192 };
	struct postcopy_region copy[2];
	struct postcopy_config good, bad;

	peer.held_fd = eventfd(0, EFD_CLOEXEC);
	good = config(copy);

#define REFUSED(change)                                \
	do {                                           \
		bad = good;                            \
		config(copy);                          \
		change;                                \
		CHECK_EQ(-try_connect(bad), EINVAL);   \
	} while (0)
	REFUSED(bad.config_size--);
	REFUSED(bad.uffd = -1);
	REFUSED(bad.vcpus = 0);
	REFUSED(bad.vcpus = EXIT_RING_VCPUS_MAX + 1);
	REFUSED(bad.region_count = 0);
	REFUSED(copy[0].size = 0);
	REFUSED(copy[0].size--);
	REFUSED(copy[0].page_size = 3 << 12);
	REFUSED(copy[0].gpa = UINT64_MAX - 4095);
	REFUSED(copy[0].image_offset = UINT64_MAX - 4095);
	REFUSED(copy[0].image_offset = 1ull << 60);
	REFUSED((bad.pinned = &outside, bad.pinned_count = 1));
	REFUSED((copy[1] = copy[0], copy[1].gpa += 63 << 12, bad.region_count = 2));
	close(peer.held_fd);
}

static void nobody_there_and_a_refusal_are_told_apart(void)
{
	struct postcopy_region copy;
	struct postcopy_config wanted;

	memset(&peer, 0, sizeof(peer));
	peer.held_fd = eventfd(0, EFD_CLOEXEC);
	wanted = config(&copy);
	unlink(path);
	CHECK_EQ(-try_connect(wanted), ENOENT);
	peer.daemon.path = path;
	peer.daemon.refuse = true;
	exit_daemon_start(&peer.daemon);
	CHECK_EQ(-try_connect(wanted), EPROTO);
	exit_daemon_crash(&peer.daemon);
	CHECK_EQ(-try_connect(wanted), ECONNREFUSED);
	close(peer.held_fd);
}

static void a_lost_page_is_told(void)
{
	struct postcopy *pc = begin();

	CHECK_EQ(fault_on(pc, 0, PARKED_GPA, 4096), POSTCOPY_WAIT);
	postcopy_kick(pc, 0);
	CHECK_EQ(postcopy_wait(pc, 0), POSTCOPY_INTERRUPTED);
	wait_until_held();
	/* Not the daemon's thread, but it holds still: nothing is posted. */
	CHECK_EQ(exit_ring_complete(&peer.daemon.ring, 0, PARKED_GPA, 0, EXIT_POISONED), EXIT_RING_OK);
	CHECK_EQ(postcopy_wait(pc, 0), POSTCOPY_LOST);
	CHECK_EQ(postcopy_wait(pc, 0), POSTCOPY_RESUMED);
	end(pc);
}

int main(void)
{
	snprintf(path, sizeof(path), "/tmp/postcopy-wait-%d", getpid());
	a_vcpu_resumes_after_the_last_of_its_pages();
	a_kick_ends_a_wait_that_nobody_answers();
	a_signal_ends_a_wait_whatever_its_handlers_flags();
	an_interrupted_wait_goes_on_without_asking_again();
	what_a_dead_daemon_owed_the_next_one_gives();
	a_watch_hands_over_again_until_told_complete();
	a_watch_can_be_stopped();
	the_end_wakes_who_still_waits();
	the_pinned_set_is_populated_and_nothing_else();
	a_lost_page_is_told();
	a_config_that_makes_no_sense_is_refused();
	nobody_there_and_a_refusal_are_told_apart();
	unlink(path);
	return 0;
}
