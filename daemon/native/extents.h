/* Where pages are mapped now: host virtual addresses ↔ page numbers, as UNMAP and REMAP change them.
 *
 * The table lies in shared memory twice; a change is written to the copy not in use, then one store makes it current.
 * So a process that dies in the middle leaves the old table or the new one, never a mixture.
 */
#ifndef POSTCOPY_EXTENTS_H
#define POSTCOPY_EXTENTS_H

#include <stdbool.h>
#include <stdint.h>

#define EXTENTS_MAX 4096

struct extent {
	uint64_t hva;
	uint64_t len_bytes;
	uint64_t first_page;
	uint32_t page_shift;
	uint32_t reserved;
};

struct extent_table {
	uint32_t count;
	uint32_t reserved;
	struct extent entry[EXTENTS_MAX]; /* ascending by hva, disjoint */
};

struct extents {
	uint32_t current; /* 0 or 1 */
	uint32_t reserved;
	struct extent_table table[2];
};

_Static_assert(sizeof(struct extent) == 32, "extent layout");

/* The extent that holds `hva`, or NULL. */
const struct extent *extents_at(const struct extents *extents, uint64_t hva);

/* The extent that holds `page`, or NULL if it is not mapped any more. */
const struct extent *extents_of_page(const struct extents *extents, uint64_t page);

/* The first extent that ends above `hva`, or NULL. */
const struct extent *extents_from(const struct extents *extents, uint64_t hva);

/* One past the last extent of the current table. */
const struct extent *extents_end(const struct extents *extents);

/* Insert; false if it overlaps or the table is full. */
bool extents_add(struct extents *extents, struct extent extent);

/* Forget [hva, hva + len). False if splitting would need more entries than there are: nothing changed. */
bool extents_unmap(struct extents *extents, uint64_t hva, uint64_t len_bytes);

/* Pages of [from, from + len) are at `to` now; what was there is forgotten. With nothing at `from` nothing changes, so that
 * doing it again, as after a crash, is harmless. False as above. */
bool extents_remap(struct extents *extents, uint64_t from, uint64_t to, uint64_t len_bytes);

static inline uint64_t extent_page(const struct extent *e, uint64_t hva)
{
	return e->first_page + ((hva - e->hva) >> e->page_shift);
}

static inline uint64_t extent_hva(const struct extent *e, uint64_t page)
{
	return e->hva + ((page - e->first_page) << e->page_shift);
}

static inline uint64_t extent_end_page(const struct extent *e)
{
	return e->first_page + (e->len_bytes >> e->page_shift);
}

#endif
