/* What the measuring programs share: time, ends, warmed memory behind a userfaultfd, percentiles. */
#ifndef POSTCOPY_BENCH_H
#define POSTCOPY_BENCH_H

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define MIB (1ul << 20)

/* A program of a bench that cannot go on says where and why, and ends. */
#define NEED(condition)                                                                               \
	do {                                                                                          \
		if (!(condition)) {                                                                   \
			fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, strerror(errno)); \
			exit(1);                                                                      \
		}                                                                                     \
	} while (0)

static inline uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Fresh anonymous memory. Warmed: written once and given back, so that the host has the pages that come next. */
static inline uint8_t *map_memory(size_t len, bool warm)
{
	uint8_t *memory = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	NEED(memory != MAP_FAILED);
	/* Faults are counted by the page, so a huge page must not take 512 of them away. */
	NEED(madvise(memory, len, MADV_NOHUGEPAGE) == 0);
	if (warm) {
		for (size_t at = 0; at < len; at += PAGE)
			memory[at] = 1;
		NEED(madvise(memory, len, MADV_DONTNEED) == 0);
	}
	return memory;
}

/* Let absent pages of `memory` be reported to a new userfaultfd. */
static inline int register_missing(const uint8_t *memory, size_t len)
{
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_THREAD_ID};
	struct uffdio_register range = {
		.range = {.start = (uintptr_t)memory, .len = len}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	NEED(uffd >= 0);
	NEED(ioctl(uffd, UFFDIO_API, &api) == 0);
	NEED(ioctl(uffd, UFFDIO_REGISTER, &range) == 0);
	return uffd;
}

static inline void copy_in(int uffd, uint64_t address, const void *from, size_t len)
{
	struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)from, .len = len};

	NEED(ioctl(uffd, UFFDIO_COPY, &copy) == 0);
}

/* Wait for fault messages and read up to `most` of them; 0 when the other end is gone. */
static inline size_t read_faults(int uffd, struct uffd_msg *messages, size_t most)
{
	struct pollfd wait = {.fd = uffd, .events = POLLIN};

	for (;;) {
		if (poll(&wait, 1, -1) < 0 || wait.revents & POLLERR)
			return 0;
		ssize_t n = read(uffd, messages, most * sizeof(*messages));
		if (n > 0)
			return (size_t)n / sizeof(*messages);
		NEED(n < 0 && errno == EAGAIN);
	}
}

static inline uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static inline int compare_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* Sort `ns` and print `{"p50": …}` in microseconds. */
static inline void print_percentiles(uint64_t *ns, size_t count)
{
	qsort(ns, count, sizeof(*ns), compare_u64);
	const char *names[] = {"p50", "p90", "p99"};
	const size_t per_mille[] = {500, 900, 990};

	putchar('{');
	for (int i = 0; i < 3; i++)
		printf("%s\"%s\": %.1f", i ? ", " : "", names[i],
		       count ? (double)ns[(count - 1) * per_mille[i] / 1000] / 1000 : 0.0);
	putchar('}');
}

#endif
