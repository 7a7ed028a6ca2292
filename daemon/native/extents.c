#include "extents.h"

#include "crash.h"

#include <string.h>

static const struct extent_table *current(const struct extents *extents)
{
	return &extents->table[__atomic_load_n(&extents->current, __ATOMIC_ACQUIRE) & 1];
}

static struct extent_table *spare(struct extents *extents)
{
	return &extents->table[(extents->current & 1) ^ 1];
}

static void publish(struct extents *extents)
{
	CRASH_POINT("extents.written");
	__atomic_store_n(&extents->current, (extents->current & 1) ^ 1, __ATOMIC_RELEASE);
}

const struct extent *extents_end(const struct extents *extents)
{
	const struct extent_table *t = current(extents);

	return t->entry + t->count;
}

const struct extent *extents_from(const struct extents *extents, uint64_t hva)
{
	const struct extent_table *t = current(extents);
	uint32_t low = 0, high = t->count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (t->entry[middle].hva + t->entry[middle].len_bytes <= hva)
			low = middle + 1;
		else
			high = middle;
	}
	return low < t->count ? &t->entry[low] : NULL;
}

const struct extent *extents_at(const struct extents *extents, uint64_t hva)
{
	const struct extent *e = extents_from(extents, hva);

	return e && e->hva <= hva ? e : NULL;
}

const struct extent *extents_of_page(const struct extents *extents, uint64_t page)
{
	const struct extent_table *t = current(extents);

	/* A handful of entries unless the VMM splits its memory; then still cheaper than a second index to keep right. */
	for (uint32_t i = 0; i < t->count; i++)
		if (page - t->entry[i].first_page < t->entry[i].len_bytes >> t->entry[i].page_shift)
			return &t->entry[i];
	return NULL;
}

/* Append while keeping the limit; the input is visited in ascending order, so the output is sorted. */
static bool append(struct extent_table *t, struct extent e)
{
	if (e.len_bytes == 0)
		return true;
	if (t->count == EXTENTS_MAX)
		return false;
	t->entry[t->count++] = e;
	return true;
}

/* The part of `e` in [from, to), empty if none. */
static struct extent clip(struct extent e, uint64_t from, uint64_t to)
{
	uint64_t start = e.hva > from ? e.hva : from;
	uint64_t end = e.hva + e.len_bytes < to ? e.hva + e.len_bytes : to;

	if (start >= end)
		return (struct extent){ 0 };
	return (struct extent){
		.hva = start,
		.len_bytes = end - start,
		.first_page = extent_page(&e, start),
		.page_shift = e.page_shift,
	};
}

/* Copy the current table to the spare one without [hole, hole_end). */
static bool copy_without(struct extents *extents, uint64_t hole, uint64_t hole_end)
{
	const struct extent_table *from = current(extents);
	struct extent_table *to = spare(extents);

	to->count = 0;
	for (uint32_t i = 0; i < from->count; i++)
		if (!append(to, clip(from->entry[i], 0, hole)) || !append(to, clip(from->entry[i], hole_end, UINT64_MAX)))
			return false;
	return true;
}

static bool insert_sorted(struct extent_table *t, struct extent e)
{
	uint32_t at = 0;

	if (t->count == EXTENTS_MAX)
		return false;
	while (at < t->count && t->entry[at].hva < e.hva)
		at++;
	if (at > 0 && t->entry[at - 1].hva + t->entry[at - 1].len_bytes > e.hva)
		return false;
	if (at < t->count && e.hva + e.len_bytes > t->entry[at].hva)
		return false;
	memmove(&t->entry[at + 1], &t->entry[at], (t->count - at) * sizeof(e));
	t->entry[at] = e;
	t->count++;
	return true;
}

bool extents_add(struct extents *extents, struct extent e)
{
	if (!copy_without(extents, 0, 0) || !insert_sorted(spare(extents), e))
		return false;
	publish(extents);
	return true;
}

bool extents_unmap(struct extents *extents, uint64_t hva, uint64_t len_bytes)
{
	if (!copy_without(extents, hva, hva + len_bytes))
		return false;
	publish(extents);
	return true;
}

static bool any_in(const struct extents *extents, uint64_t hva, uint64_t len_bytes)
{
	const struct extent *e = extents_from(extents, hva);

	return e && e->hva < hva + len_bytes;
}

bool extents_remap(struct extents *extents, uint64_t from, uint64_t to, uint64_t len_bytes)
{
	const struct extent_table *old = current(extents);
	struct extent_table *new = spare(extents);

	if (!any_in(extents, from, len_bytes))
		return true;
	new->count = 0;
	for (uint32_t i = 0; i < old->count; i++) {
		struct extent below = clip(old->entry[i], 0, from);
		struct extent above = clip(old->entry[i], from + len_bytes, UINT64_MAX);

		/* What the move overwrites is forgotten; a move never overlaps its own origin (mremap(2)). */
		if (!append(new, clip(below, 0, to)) || !append(new, clip(below, to + len_bytes, UINT64_MAX)) ||
		    !append(new, clip(above, 0, to)) || !append(new, clip(above, to + len_bytes, UINT64_MAX)))
			return false;
	}
	for (uint32_t i = 0; i < old->count; i++) {
		struct extent moved = clip(old->entry[i], from, from + len_bytes);

		if (moved.len_bytes == 0)
			continue;
		moved.hva = moved.hva - from + to;
		if (!insert_sorted(new, moved))
			return false;
	}
	publish(extents);
	return true;
}
