/* Hybrid start: pages that were copied before the hand-off are settled from the beginning. */
#include "pager.h"

#define BITMAP_PAGE 4096u

static bool is_set(const uint8_t *bitmap, uint64_t bit)
{
	return bitmap[bit / 8] >> (bit % 8) & 1;
}

/* The first bit from `bit` on that is set, or is not; `bits` if there is none. Empty and full bytes are passed whole. */
static uint64_t next(const uint8_t *bitmap, uint64_t bit, uint64_t bits, bool wanted)
{
	uint8_t passed = wanted ? 0 : 0xff;

	while (bit < bits && is_set(bitmap, bit) != wanted) {
		if (bit % 8 == 0 && bitmap[bit / 8] == passed)
			bit += 8;
		else
			bit++;
	}
	return bit < bits ? bit : bits;
}

void pager_mark_present_bitmap(struct pager *p, const uint8_t *bitmap, uint64_t len_bytes)
{
	uint64_t bits = len_bytes * 8;

	for (uint64_t from = next(bitmap, 0, bits, true); from < bits;) {
		uint64_t to = next(bitmap, from, bits, false);

		/* A huge page of which a part is missing is not marked: pager_mark_present takes whole pages. */
		pager_mark_present(p, from * BITMAP_PAGE, (to - from) * BITMAP_PAGE);
		from = next(bitmap, to, bits, true);
	}
}
