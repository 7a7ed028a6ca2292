/*
 * What the kernel alone can do: faults answered by a thread of the same process, and UFFDIO_COPY in a loop.
 *
 *     local pages THREADS COUNT    COUNT faults by THREADS threads, one handler thread
 *     local copy MIB               MIB of warmed memory in calls of 256 KiB
 */
#include <pthread.h>

#include "bench.h"

#define CALL_BYTES (256ul << 10)

struct toucher {
	pthread_t thread;
	pthread_barrier_t *start;
	volatile const uint8_t *memory;
	size_t pages;
	uint64_t began, ended;
};

static void *touch(void *argument)
{
	struct toucher *t = argument;

	pthread_barrier_wait(t->start);
	t->began = now_ns();
	for (size_t page = 0; page < t->pages; page++)
		NEED(t->memory[page * PAGE] == 0x5a);
	t->ended = now_ns();
	return NULL;
}

static void *handle_faults(void *argument)
{
	static uint8_t page[PAGE] __attribute__((aligned(4096)));
	struct uffd_msg messages[64];
	int uffd = *(int *)argument;
	size_t n;

	memset(page, 0x5a, sizeof(page));
	while ((n = read_faults(uffd, messages, 64)) > 0)
		for (size_t i = 0; i < n; i++)
			copy_in(uffd, messages[i].arg.pagefault.address & ~(PAGE - 1), page, PAGE);
	return NULL;
}

static void measure_pages(size_t threads, size_t count)
{
	size_t each = (count + threads - 1) / threads, len = each * threads * PAGE;
	uint8_t *memory = map_memory(len, true);
	int uffd = register_missing(memory, len);
	struct toucher *touchers = calloc(threads, sizeof(*touchers));
	pthread_barrier_t start;
	pthread_t handler;
	uint64_t began = UINT64_MAX, ended = 0;

	NEED(touchers && pthread_barrier_init(&start, NULL, (unsigned)threads) == 0);
	NEED(pthread_create(&handler, NULL, handle_faults, &uffd) == 0);
	for (size_t i = 0; i < threads; i++) {
		touchers[i] = (struct toucher){.start = &start, .memory = memory + i * each * PAGE, .pages = each};
		NEED(pthread_create(&touchers[i].thread, NULL, touch, &touchers[i]) == 0);
	}
	for (size_t i = 0; i < threads; i++) {
		pthread_join(touchers[i].thread, NULL);
		began = touchers[i].began < began ? touchers[i].began : began;
		ended = touchers[i].ended > ended ? touchers[i].ended : ended;
	}
	printf("{\"pages_s\": %.0f}\n", (double)(each * threads) / ((double)(ended - began) / 1e9));
}

static void measure_copy(size_t mib)
{
	size_t len = mib * MIB;
	uint8_t *memory = map_memory(len, true), *content = map_memory(4 * CALL_BYTES, false);
	int uffd = register_missing(memory, len);

	memset(content, 0x5a, 4 * CALL_BYTES);
	uint64_t began = now_ns();
	for (size_t at = 0; at < len; at += CALL_BYTES)
		copy_in(uffd, (uintptr_t)memory + at, content + at % (4 * CALL_BYTES), CALL_BYTES);
	double took_s = (double)(now_ns() - began) / 1e9;
	printf("{\"mib_s\": %.0f}\n", (double)mib / took_s);
}

int main(int argc, char **argv)
{
	if (argc == 4 && strcmp(argv[1], "pages") == 0 && strtoul(argv[2], NULL, 10) > 0)
		measure_pages(strtoul(argv[2], NULL, 10), strtoul(argv[3], NULL, 10));
	else if (argc == 3 && strcmp(argv[1], "copy") == 0)
		measure_copy(strtoul(argv[2], NULL, 10));
	else {
		fprintf(stderr, "usage: local pages THREADS COUNT | copy MIB\n");
		return 2;
	}
	return 0;
}
