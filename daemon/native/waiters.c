#include "waiters.h"

#include <stdlib.h>
#include <string.h>

#define FIRST_SLOTS 256u
#define EMPTY UINT64_MAX

static uint32_t home(const struct waiters *w, uint64_t page)
{
	return (uint32_t)(page * 0x9e3779b97f4a7c15ull >> 32) & (w->slots - 1);
}

static bool allocate(struct waiters *w, uint32_t slots)
{
	struct waiter *slot = malloc(slots * sizeof(*slot));

	if (!slot)
		return false;
	for (uint32_t i = 0; i < slots; i++)
		slot[i].page = EMPTY;
	w->slot = slot;
	w->slots = slots;
	return true;
}

bool waiters_init(struct waiters *w)
{
	memset(w, 0, sizeof(*w));
	w->threads = 1;
	return allocate(w, FIRST_SLOTS);
}

void waiters_deinit(struct waiters *w)
{
	free(w->slot);
	w->slot = NULL;
}

uint32_t waiters_room(const struct waiters *w)
{
	return WAITERS_MAX - w->count;
}

static void put(struct waiters *w, struct waiter entry)
{
	uint32_t i = home(w, entry.page);

	while (w->slot[i].page != EMPTY)
		i = (i + 1) & (w->slots - 1);
	w->slot[i] = entry;
}

static bool grow(struct waiters *w)
{
	struct waiter *old = w->slot;
	uint32_t slots = w->slots;

	if (!allocate(w, slots * 2))
		return false;
	for (uint32_t i = 0; i < slots; i++)
		if (old[i].page != EMPTY)
			put(w, old[i]);
	free(old);
	return true;
}

bool waiters_add(struct waiters *w, uint64_t page, uint32_t tid, uint64_t now_ns, bool *first)
{
	*first = true;
	for (uint32_t i = home(w, page); w->slot[i].page != EMPTY; i = (i + 1) & (w->slots - 1)) {
		if (w->slot[i].page != page)
			continue;
		*first = false;
		/* A thread that was kicked and came back still waits since its first fault. */
		if (w->slot[i].tid == tid)
			return true;
	}
	if (w->count == WAITERS_MAX || (w->count * 2 >= w->slots && !grow(w)))
		return false;
	put(w, (struct waiter){ .page = page, .since_ns = now_ns, .tid = tid });
	w->count++;
	return true;
}

bool waiters_has(const struct waiters *w, uint64_t page)
{
	for (uint32_t i = home(w, page); w->slot[i].page != EMPTY; i = (i + 1) & (w->slots - 1))
		if (w->slot[i].page == page)
			return true;
	return false;
}

bool waiters_has_thread(const struct waiters *w, uint64_t page, uint32_t tid)
{
	for (uint32_t i = home(w, page); w->slot[i].page != EMPTY; i = (i + 1) & (w->slots - 1))
		if (w->slot[i].page == page && w->slot[i].tid == tid)
			return true;
	return false;
}

static struct blocked_thread *thread_of(struct waiters *w, uint32_t tid)
{
	if (tid == 0)
		return &w->thread[0];
	for (uint32_t i = 1; i < w->threads; i++)
		if (w->thread[i].tid == tid)
			return &w->thread[i];
	if (w->threads == BLOCKED_THREADS_MAX)
		return &w->thread[0];
	w->thread[w->threads].tid = tid;
	return &w->thread[w->threads++];
}

/* Remove slot i and close the gap, so that every entry stays reachable from its home. */
static void take_out(struct waiters *w, uint32_t i)
{
	uint32_t mask = w->slots - 1, gap = i;

	for (uint32_t j = (i + 1) & mask; w->slot[j].page != EMPTY; j = (j + 1) & mask) {
		uint32_t h = home(w, w->slot[j].page);

		if (((j - h) & mask) >= ((j - gap) & mask)) {
			w->slot[gap] = w->slot[j];
			gap = j;
		}
	}
	w->slot[gap].page = EMPTY;
	w->count--;
}

static void account(struct waiters *w, const struct waiter *entry, uint64_t now_ns)
{
	uint64_t ns = now_ns - entry->since_ns;
	struct blocked_thread *t = thread_of(w, entry->tid);

	histogram_add(&w->latency, ns);
	t->faults++;
	t->blocked_ns += ns;
	if (entry->tid & WAITER_EXIT && w->answered)
		w->answered(w->context, entry);
}

static uint32_t resolve_page(struct waiters *w, uint64_t page, uint64_t now_ns)
{
	uint32_t i = home(w, page), found = 0;

	while (w->slot[i].page != EMPTY) {
		if (w->slot[i].page == page) {
			account(w, &w->slot[i], now_ns);
			take_out(w, i); /* another entry may have moved here: look at i again */
			found++;
		} else {
			i = (i + 1) & (w->slots - 1);
		}
	}
	return found;
}

uint32_t waiters_resolve(struct waiters *w, uint64_t first, uint64_t count, uint64_t now_ns)
{
	uint32_t found = 0;

	if (w->count == 0)
		return 0;
	if (count <= w->slots) {
		for (uint64_t i = 0; i < count && w->count; i++)
			found += resolve_page(w, first + i, now_ns);
		return found;
	}
	for (uint32_t i = 0; i < w->slots && w->count;) {
		if (w->slot[i].page != EMPTY && w->slot[i].page - first < count)
			found += resolve_page(w, w->slot[i].page, now_ns);
		else
			i++;
	}
	return found;
}

const struct waiter *waiters_next(const struct waiters *w, uint32_t *at)
{
	while (*at < w->slots) {
		const struct waiter *entry = &w->slot[(*at)++];

		if (entry->page != EMPTY)
			return entry;
	}
	return NULL;
}

uint64_t waiters_oldest_ns(const struct waiters *w)
{
	uint64_t oldest = 0;
	uint32_t at = 0;
	const struct waiter *entry;

	while (w->count && (entry = waiters_next(w, &at)))
		if (oldest == 0 || entry->since_ns < oldest)
			oldest = entry->since_ns;
	return oldest;
}
