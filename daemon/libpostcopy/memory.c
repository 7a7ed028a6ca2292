#include "memory.h"

const struct postcopy_region *memory_region(const struct postcopy *pc, uint64_t gpa)
{
	size_t low = 0, high = pc->regions;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (pc->region[middle].gpa <= gpa)
			low = middle + 1;
		else
			high = middle;
	}
	if (!low || gpa - pc->region[low - 1].gpa >= pc->region[low - 1].size)
		return NULL;
	return &pc->region[low - 1];
}

const void *memory_bytes(const struct postcopy *pc, uint64_t gpa, size_t len)
{
	const struct postcopy_region *region = memory_region(pc, gpa);

	if (!region)
		return pc->other_memory ? pc->other_memory(pc->context, gpa, len) : NULL;
	if (len > region->size - (gpa - region->gpa))
		return NULL;
	return (const void *)(uintptr_t)(region->hva + (gpa - region->gpa));
}

uint64_t memory_page(const struct postcopy *pc, uint64_t gpa)
{
	const struct postcopy_region *region = memory_region(pc, gpa);
	uint64_t page_size = region ? region->page_size : PAGE_BYTES;

	return gpa & ~(page_size - 1);
}

bool postcopy_is_missing(const struct postcopy *pc, uint64_t gpa)
{
	const struct postcopy_region *region = memory_region(pc, gpa);

	if (!region || exit_ring_is_complete(&pc->ring))
		return false;
	return !exit_ring_is_resident(&pc->ring, (region->image_offset + (gpa - region->gpa)) >> EXIT_RING_PAGE_SHIFT);
}
