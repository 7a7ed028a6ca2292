/*
 * Free memory that stays warm: `pool MIB` touches MIB of memory and gives all of it back but a page here and there, until
 * its input ends.
 *
 * A virtual machine's kernel tells its host of free memory in whole blocks of 2 MiB, some of it every two seconds
 * (mm/page_reporting.c), and the host takes them: the next touch of each page then costs up to ten times as much. Whether
 * that falls between the warming of memory and its use is luck. What is free around a page that is not is no
 * whole block, so it is never told of; and the allocator takes such pieces first.
 */
#include "bench.h"

/* One page of so many is kept. In memory order blocks of 2 MiB have 512, and memory is handed out mostly in that order. */
#define EVERY 32

int main(int argc, char **argv)
{
	size_t len = argc == 2 ? strtoul(argv[1], NULL, 10) * MIB : 0;

	if (len == 0) {
		fprintf(stderr, "usage: pool MIB\n");
		return 2;
	}
	uint8_t *memory = map_memory(len, false);
	for (size_t at = 0; at < len; at += PAGE)
		memory[at] = 1;
	for (size_t at = 0; at < len; at += EVERY * PAGE)
		NEED(madvise(memory + at + PAGE, (EVERY - 1) * PAGE, MADV_DONTNEED) == 0);
	printf("{\"pool_mib\": %zu}\n", len / MIB);
	fflush(stdout);
	while (getchar() != EOF)
		;
	return 0;
}
