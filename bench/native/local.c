/*
 * What the kernel alone can do: faults answered by a thread of the same process, and UFFDIO_COPY in a loop.
 *
 *     local pages THREADS COUNT    COUNT faults by THREADS threads, one handler thread
 *     local copy MIB               MIB of warmed memory in calls of 256 KiB
 */
#include "touchers.h"

#define CALL_BYTES (256ul << 10)

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
	pthread_t handler;

	NEED(pthread_create(&handler, NULL, handle_faults, &uffd) == 0);
	printf("{\"pages_s\": %.0f}\n", touch_all(memory, threads, each));
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
