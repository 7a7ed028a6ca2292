// sources: pager.c pager_install.c pager_request.c state.c ledger.c extents.c uffd.c histogram.c inflight.c waiters.c wire.c crash.c pager_exits.c exit_ring.c exit_ring_map.c checksum.c checksum_avx2.c
// libs: -pthread
/* On the real kernel: a thread that gives memory back while it is unregistered goes on. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "pager.h"

enum { PAGES = 64, PAGE = 4096, ROUNDS = 3000, PATIENCE_S = 20, DRAINS = 300 };

static char *memory;
static atomic_uint asked, given_back;

/* Gives every page back, once for each time it is asked. */
static void *balloon(void *unused)
{
	for (unsigned seen = 0; seen < ROUNDS; seen++) {
		while (atomic_load(&asked) == seen)
			continue;
		for (char *p = memory; p < memory + PAGES * PAGE; p += PAGE)
			CHECK_EQ(madvise(p, PAGE, MADV_DONTNEED), 0);
		atomic_store(&given_back, seen + 1);
	}
	return unused;
}

static bool given_back_in_time(unsigned round)
{
	time_t end = time(NULL) + PATIENCE_S;

	while (atomic_load(&given_back) != round)
		if (time(NULL) > end)
			return false;
	return true;
}

int main(void)
{
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1 /* UFFD_USER_MODE_ONLY */);
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
	struct uffdio_register missing = { .range = { .len = PAGES * PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	uint64_t state_len = pager_state_bytes(PAGES);
	void *state = aligned_alloc(PAGE, state_len);
	pthread_t thread;

	if (uffd < 0 && (errno == ENOSYS || errno == EPERM))
		return 0;
	CHECK(uffd >= 0 && state && ioctl(uffd, UFFDIO_API, &api) == 0);
	memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(memory != MAP_FAILED);
	missing.range.start = (uintptr_t)memory;
	CHECK_EQ(pthread_create(&thread, NULL, balloon, NULL), 0);
	for (unsigned round = 1; round <= ROUNDS; round++) {
		const struct region region = { (uintptr_t)memory, PAGES * PAGE, 0, 0, 0, 12, 0 };
		struct pager *pager;

		CHECK_EQ(ioctl(uffd, UFFDIO_REGISTER, &missing), 0);
		memset(state, 0, state_len);
		pager = pager_create(state, state_len, &region, 1, uffd, &uffd_kernel);
		CHECK(pager != NULL);
		pager_mark_present(pager, 0, PAGES * PAGE);
		atomic_store(&asked, round);
		/* Another moment each time. */
		for (unsigned i = 0; i < round % DRAINS; i++)
			pager_drain(pager);
		CHECK_EQ(pager_release(pager), 0);
		while (!pager_let_go(pager))
			continue;
		pager_destroy(pager);
		/* Nobody reads any more. */
		CHECK(given_back_in_time(round));
	}
	CHECK_EQ(pthread_join(thread, NULL), 0);
	free(state);
	close(uffd);
	return 0;
}
