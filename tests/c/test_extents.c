// sources: extents.c crash.c
#include <string.h>

#include "check.h"
#include "extents.h"

#define BASE 0x10000000ull
#define SLOTS 64u /* addresses of the model: BASE + slot * 4096 */
#define NOTHING UINT64_MAX

static struct extents *fresh(void)
{
	struct extents *extents = calloc(1, sizeof(*extents));

	CHECK(extents);
	return extents;
}

static struct extent extent_of(uint64_t slot, uint64_t pages, uint64_t first_page)
{
	return (struct extent){ .hva = BASE + slot * 4096, .len_bytes = pages * 4096, .first_page = first_page, .page_shift = 12 };
}

static void agrees(const struct extents *extents, const uint64_t *model)
{
	for (uint64_t slot = 0; slot < SLOTS; slot++) {
		uint64_t hva = BASE + slot * 4096;
		const struct extent *e = extents_at(extents, hva + 4095);

		if (model[slot] == NOTHING) {
			CHECK(!e);
			continue;
		}
		CHECK(e);
		CHECK_EQ(extent_page(e, hva + 17), model[slot]);
		CHECK_EQ(extent_hva(e, model[slot]), hva);
		CHECK(extents_of_page(extents, model[slot]));
		CHECK_EQ(extent_hva(extents_of_page(extents, model[slot]), model[slot]), hva);
	}
	for (const struct extent *e = extents_from(extents, 0); e && e + 1 < extents_end(extents); e++)
		CHECK(e->hva + e->len_bytes <= e[1].hva);
}

static void follows_a_model_through_unmaps_and_moves(void)
{
	uint64_t seed = 99;

	for (int round = 0; round < 300; round++) {
		struct extents *extents = fresh();
		uint64_t model[SLOTS];

		for (uint64_t i = 0; i < SLOTS; i++)
			model[i] = NOTHING;
		CHECK(extents_add(extents, extent_of(4, 20, 0)));
		CHECK(extents_add(extents, extent_of(30, 10, 20)));
		for (uint64_t i = 0; i < 20; i++)
			model[4 + i] = i;
		for (uint64_t i = 0; i < 10; i++)
			model[30 + i] = 20 + i;
		agrees(extents, model);
		for (int step = 0; step < 12; step++) {
			uint64_t pages = 1 + next_random(&seed) % 8, from = next_random(&seed) % (SLOTS - pages);
			uint64_t to = next_random(&seed) % (SLOTS - pages), moved[8];
			bool any = false;

			if (next_random(&seed) % 3 == 0) {
				CHECK(extents_unmap(extents, BASE + from * 4096, pages * 4096));
				for (uint64_t i = 0; i < pages; i++)
					model[from + i] = NOTHING;
			} else if (to + pages <= from || from + pages <= to) {
				CHECK(extents_remap(extents, BASE + from * 4096, BASE + to * 4096, pages * 4096));
				for (uint64_t i = 0; i < pages; i++) {
					moved[i] = model[from + i];
					any |= moved[i] != NOTHING;
				}
				for (uint64_t i = 0; any && i < pages; i++) {
					model[from + i] = NOTHING;
					model[to + i] = moved[i];
				}
				/* As after a crash between the change and the note that it was made. */
				CHECK(extents_remap(extents, BASE + from * 4096, BASE + to * 4096, pages * 4096));
			}
			agrees(extents, model);
		}
		free(extents);
	}
}

static void refuses_what_overlaps(void)
{
	struct extents *extents = fresh();

	CHECK(extents_add(extents, extent_of(4, 4, 0)));
	CHECK(!extents_add(extents, extent_of(7, 4, 4)));
	CHECK(!extents_add(extents, extent_of(2, 3, 4)));
	CHECK(!extents_add(extents, extent_of(5, 1, 4)));
	CHECK(extents_add(extents, extent_of(8, 4, 4)));
	CHECK(extents_add(extents, extent_of(0, 4, 8)));
	free(extents);
}

static void a_full_table_stays_as_it_was(void)
{
	struct extents *extents = fresh();
	struct extent_table before;

	for (uint64_t i = 0; i < EXTENTS_MAX; i++)
		CHECK(extents_add(extents, extent_of(i * 4, 3, i * 3)));
	CHECK(!extents_add(extents, extent_of(EXTENTS_MAX * 4, 1, EXTENTS_MAX * 3)));
	before = extents->table[extents->current];
	CHECK(!extents_unmap(extents, BASE + 4096, 4096));
	CHECK(!extents_remap(extents, BASE + 4096, BASE - 8192, 4096));
	CHECK(memcmp(&before, &extents->table[extents->current], sizeof(before)) == 0);
	CHECK(extents_unmap(extents, BASE, 3 * 4096));
	CHECK(!extents_at(extents, BASE));
	free(extents);
}

static void huge_pages_keep_their_numbers(void)
{
	struct extents *extents = fresh();
	const struct extent *e;

	CHECK(extents_add(extents, (struct extent){ .hva = 1ull << 30, .len_bytes = 8ull << 21, .first_page = 5, .page_shift = 21 }));
	CHECK(extents_unmap(extents, (1ull << 30) + (2ull << 21), 1ull << 21));
	e = extents_at(extents, (1ull << 30) + (3ull << 21) + 12345);
	CHECK(e);
	CHECK_EQ(extent_page(e, (1ull << 30) + (3ull << 21) + 12345), 8);
	CHECK_EQ(extent_end_page(e), 13);
	CHECK(!extents_of_page(extents, 7));
	free(extents);
}

int main(void)
{
	follows_a_model_through_unmaps_and_moves();
	refuses_what_overlaps();
	a_full_table_stays_as_it_was();
	huge_pages_keep_their_numbers();
	return 0;
}
