// sources: pager.c pager_install.c pager_request.c state.c ledger.c extents.c uffd.c histogram.c inflight.c waiters.c wire.c crash.c pager_exits.c exit_ring.c exit_ring_map.c exit_ring_vmm.c checksum.c checksum_avx2.c ../libpostcopy/local.c ../libpostcopy/memory.c
// libs: -pthread
/* On the real kernel: a vCPU's thread that installs from the image never brings back what a balloon has given back. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "pager.h"
#include "../../daemon/libpostcopy/local.h"

enum { PAGES = 64, PAGE = 4096, ROUNDS = 600, VCPUS = 2, PATIENCE_S = 20, SPINS = 2000 };
#define GPA (4ull << 30)

static char *memory;
static uint8_t image[PAGES * PAGE] __attribute__((aligned(PAGE)));
static struct postcopy pc;
static struct vcpu_side vcpus[VCPUS] __attribute__((aligned(128)));
static struct postcopy_region region;
static atomic_uint asked, given_back, vcpus_done;
static atomic_ulong installed, refused;

/* Gives the first page back, once for each time it is asked. */
static void *balloon(void *unused)
{
	for (unsigned seen = 0; seen < ROUNDS; seen++) {
		while (atomic_load(&asked) == seen)
			continue;
		for (volatile unsigned i = 0; i < seen * 7 % SPINS; i++)
			continue;
		CHECK_EQ(madvise(memory, PAGE, MADV_DONTNEED), 0);
		atomic_store(&given_back, seen + 1);
	}
	return unused;
}

/* Wants the first page again and again until it was given back, and then once more. */
static void *vcpu(void *argument)
{
	struct vcpu_side *side = argument;

	for (unsigned seen = 0; seen < ROUNDS; seen++) {
		bool over = false;

		while (atomic_load(&asked) == seen)
			continue;
		while (!over) {
			over = atomic_load(&given_back) > seen;
			side->want_count = 1;
			side->want[0] = GPA;
			local_install(&pc, side);
			atomic_fetch_add(side->want_count ? &refused : &installed, 1);
		}
		atomic_fetch_add(&vcpus_done, 1);
	}
	return NULL;
}

static bool is_present(const char *page)
{
	unsigned char there;

	CHECK_EQ(mincore((void *)(uintptr_t)page, PAGE, &there), 0);
	return there & 1;
}

static void run_round(unsigned round, int uffd, void *state, void *ring_mem, size_t ring_len)
{
	struct uffdio_register missing = { .range = { (uintptr_t)memory, PAGES * PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	const struct region memory_region = { (uintptr_t)memory, PAGES * PAGE, 0, 0, GPA, 12, 0 };
	time_t end = time(NULL) + PATIENCE_S;
	struct pager *pager;

	CHECK_EQ(madvise(memory, PAGES * PAGE, MADV_DONTNEED), 0);
	CHECK_EQ(ioctl(uffd, UFFDIO_REGISTER, &missing), 0);
	memset(state, 0, pager_state_bytes(PAGES));
	memset(ring_mem, 0, ring_len);
	exit_ring_format(&pc.ring, ring_mem, VCPUS, PAGES, true);
	for (uint32_t i = 0; i < VCPUS; i++)
		exit_lane_init(&vcpus[i].lane, &pc.ring, i);
	pager = pager_create(state, pager_state_bytes(PAGES), &memory_region, 1, uffd, &uffd_kernel);
	CHECK(pager != NULL);
	CHECK_EQ(pager_attach_ring(pager, ring_mem, ring_len, true), 0);
	pager_drain(pager);
	atomic_store(&asked, round);
	while (atomic_load(&vcpus_done) != round * VCPUS) {
		pager_drain(pager);
		CHECK(time(NULL) < end);
	}
	/* Whoever touched it now would have to find zeros. */
	CHECK(!is_present(memory));
	CHECK_EQ(pager_release(pager), 0);
	while (!pager_let_go(pager))
		continue;
	pager_destroy(pager);
}

int main(void)
{
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1 /* UFFD_USER_MODE_ONLY */);
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
	size_t ring_len = exit_ring_bytes(VCPUS, PAGES);
	void *state = aligned_alloc(PAGE, pager_state_bytes(PAGES)), *ring_mem = aligned_alloc(PAGE, ring_len);
	pthread_t balloon_thread, vcpu_thread[VCPUS];

	if (uffd < 0 && (errno == ENOSYS || errno == EPERM))
		return 0;
	CHECK(uffd >= 0 && state && ring_mem && ioctl(uffd, UFFDIO_API, &api) == 0);
	memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(memory != MAP_FAILED);
	memset(image, 0x5a, sizeof(image));
	region = (struct postcopy_region){ .gpa = GPA, .hva = (uintptr_t)memory, .size = PAGES * PAGE, .page_size = PAGE };
	pc = (struct postcopy){ .uffd = uffd, .region = &region, .regions = 1, .image = image, .image_len = sizeof(image),
				.doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), .vcpu = vcpus };
	CHECK_EQ(pthread_create(&balloon_thread, NULL, balloon, NULL), 0);
	for (unsigned i = 0; i < VCPUS; i++)
		CHECK_EQ(pthread_create(&vcpu_thread[i], NULL, vcpu, &vcpus[i]), 0);
	for (unsigned round = 1; round <= ROUNDS; round++)
		run_round(round, uffd, state, ring_mem, ring_len);
	CHECK_EQ(pthread_join(balloon_thread, NULL), 0);
	for (unsigned i = 0; i < VCPUS; i++)
		CHECK_EQ(pthread_join(vcpu_thread[i], NULL), 0);
	/* Both happened, or nothing was tried. */
	CHECK(atomic_load(&installed) > ROUNDS && atomic_load(&refused) > ROUNDS);
	free(state);
	free(ring_mem);
	close(uffd);
	return 0;
}
