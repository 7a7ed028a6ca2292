/* Threads that touch absent memory, each its own part of it, page after page. */
#ifndef POSTCOPY_BENCH_TOUCHERS_H
#define POSTCOPY_BENCH_TOUCHERS_H

#include <pthread.h>

#include "bench.h"

struct toucher {
	pthread_t thread;
	pthread_barrier_t *start;
	volatile const uint8_t *memory;
	size_t pages;
	uint64_t began, ended;
};

static inline void *touch(void *argument)
{
	struct toucher *t = argument;

	pthread_barrier_wait(t->start);
	t->began = now_ns();
	for (size_t page = 0; page < t->pages; page++)
		NEED(t->memory[page * PAGE] == 0x5a);
	t->ended = now_ns();
	return NULL;
}

/* Pages a second, from the first thread's start to the last one's end. */
static inline double touch_all(const uint8_t *memory, size_t threads, size_t each)
{
	struct toucher *touchers = calloc(threads, sizeof(*touchers));
	pthread_barrier_t start;
	uint64_t began = UINT64_MAX, ended = 0;

	NEED(touchers && pthread_barrier_init(&start, NULL, (unsigned)threads) == 0);
	for (size_t i = 0; i < threads; i++) {
		touchers[i] = (struct toucher){.start = &start, .memory = memory + i * each * PAGE, .pages = each};
		NEED(pthread_create(&touchers[i].thread, NULL, touch, &touchers[i]) == 0);
	}
	for (size_t i = 0; i < threads; i++) {
		pthread_join(touchers[i].thread, NULL);
		began = touchers[i].began < began ? touchers[i].began : began;
		ended = touchers[i].ended > ended ? touchers[i].ended : ended;
	}
	free(touchers);
	return (double)(each * threads) / ((double)(ended - began) / 1e9);
}

#endif
