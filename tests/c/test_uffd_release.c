// sources: uffd.c
// libs: -pthread
/* On the real kernel: nobody is left waiting when memory is unregistered while a thread faults on it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "uffd.h"

enum { PAGES = 256, PAGE = 4096, ROUNDS = 4000, PATIENCE_S = 20, SPINS = 800 };

static char *memory;
static atomic_uint asked, read_through;

/* Reads everything, once for each time it is asked. */
static void *reader(void *unused)
{
	for (unsigned seen = 0; seen < ROUNDS; seen++) {
		while (atomic_load(&asked) == seen)
			continue;
		for (const volatile char *p = memory; p < memory + PAGES * PAGE; p += PAGE)
			CHECK_EQ(*p, 0);
		atomic_store(&read_through, seen + 1);
	}
	return unused;
}

static bool read_through_in_time(unsigned round)
{
	time_t end = time(NULL) + PATIENCE_S;

	while (atomic_load(&read_through) != round)
		if (time(NULL) > end)
			return false;
	return true;
}

int main(void)
{
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1 /* UFFD_USER_MODE_ONLY */);
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register missing = { .range = { .len = PAGES * PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	pthread_t thread;

	if (uffd < 0 && (errno == ENOSYS || errno == EPERM))
		return 0;
	CHECK(uffd >= 0 && ioctl(uffd, UFFDIO_API, &api) == 0);
	memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(memory != MAP_FAILED);
	missing.range.start = (uintptr_t)memory;
	CHECK_EQ(pthread_create(&thread, NULL, reader, NULL), 0);
	for (unsigned round = 1; round <= ROUNDS; round++) {
		CHECK_EQ(madvise(memory, PAGES * PAGE, MADV_DONTNEED), 0);
		CHECK_EQ(ioctl(uffd, UFFDIO_REGISTER, &missing), 0);
		atomic_store(&asked, round);
		/* Another moment each time. */
		for (volatile unsigned i = 0; i < round % SPINS; i++)
			continue;
		CHECK_EQ(uffd_kernel.unregister(uffd, (uintptr_t)memory, PAGES * PAGE), 0);
		CHECK(read_through_in_time(round));
	}
	CHECK_EQ(pthread_join(thread, NULL), 0);
	return 0;
}
