#include "state.h"

#define PAGE_SHIFT_MIN 12
#define PAGE_SHIFT_MAX 30

static uint64_t align(uint64_t value)
{
	return (value + 4095) & ~(uint64_t)4095;
}

struct state_header state_layout(uint64_t pages)
{
	struct state_header h = {
		.magic = STATE_MAGIC,
		.version = STATE_VERSION,
		.header_bytes = sizeof(struct state_header),
		.pages = pages,
		.descriptor_capacity = STATE_DESCRIPTOR_BYTES,
		.inbox_slots = STATE_INBOX_SLOTS,
	};

	h.descriptor_offset = align(sizeof(h));
	h.regions_offset = align(h.descriptor_offset + 2 * STATE_DESCRIPTOR_BYTES);
	h.inbox_offset = align(h.regions_offset + STATE_REGIONS_MAX * sizeof(struct region));
	h.extents_offset = align(h.inbox_offset + STATE_INBOX_SLOTS * sizeof(struct uffd_msg));
	h.words_offset = align(h.extents_offset + sizeof(struct extents));
	h.total_bytes = align(h.words_offset + ledger_bytes(pages));
	return h;
}

/* Aligned, not empty, and without overflow: what every computation with it takes for granted. */
static bool memory_is_sane(uint64_t hva, uint64_t len_bytes, uint32_t page_shift)
{
	uint64_t end;

	if (page_shift < PAGE_SHIFT_MIN || page_shift > PAGE_SHIFT_MAX || len_bytes == 0)
		return false;
	return ((hva | len_bytes) & ((1ull << page_shift) - 1)) == 0 && !__builtin_add_overflow(hva, len_bytes, &end);
}

uint64_t state_number_pages(struct region *regions, uint32_t count)
{
	uint64_t pages = 0, end;

	for (uint32_t i = 0; i < count; i++) {
		struct region *r = &regions[i];

		if (!memory_is_sane(r->hva, r->len_bytes, r->page_shift) ||
		    __builtin_add_overflow(r->image_offset, r->len_bytes, &end))
			return 0;
		r->first_page = pages;
		pages += r->len_bytes >> r->page_shift;
		/* So many pages would need more state memory than there can be. */
		if (pages > UINT64_MAX / 4096)
			return 0;
	}
	return pages;
}

static bool layout_is_ours(const struct state_header *h, uint64_t len_bytes)
{
	struct state_header ours;

	if (len_bytes < sizeof(*h) || h->magic != STATE_MAGIC || h->version != STATE_VERSION)
		return false;
	if (h->pages > len_bytes * 4)
		return false;
	ours = state_layout(h->pages);
	return h->header_bytes == ours.header_bytes && h->total_bytes == ours.total_bytes && len_bytes >= ours.total_bytes &&
	       h->descriptor_offset == ours.descriptor_offset && h->descriptor_capacity == ours.descriptor_capacity &&
	       h->descriptor_len[h->descriptor_current & 1] <= h->descriptor_capacity &&
	       h->regions_offset == ours.regions_offset &&
	       h->inbox_offset == ours.inbox_offset && h->inbox_slots == ours.inbox_slots &&
	       h->extents_offset == ours.extents_offset && h->words_offset == ours.words_offset;
}

/* Each region as memory_is_sane wants it, numbered through, and as many pages as the header says. */
static bool regions_are_sound(const struct state_header *h, const struct region *region)
{
	uint64_t pages = 0, end;

	if (h->regions == 0 || h->regions > STATE_REGIONS_MAX)
		return false;
	for (uint32_t i = 0; i < h->regions; i++) {
		const struct region *r = &region[i];

		if (!memory_is_sane(r->hva, r->len_bytes, r->page_shift) || r->first_page != pages ||
		    __builtin_add_overflow(r->image_offset, r->len_bytes, &end))
			return false;
		pages += r->len_bytes >> r->page_shift;
		if (pages > h->pages)
			return false;
	}
	return pages == h->pages;
}

/* Within one region and with its page size: a reply's bytes are laid out by the region and installed by the extent. */
static bool extent_fits(const struct extent *e, const struct state_header *h, const struct region *region)
{
	uint64_t count = e->len_bytes >> e->page_shift;

	for (uint32_t i = 0; i < h->regions; i++) {
		uint64_t pages = region[i].len_bytes >> region[i].page_shift;

		if (e->first_page - region[i].first_page < pages)
			return e->page_shift == region[i].page_shift &&
			       count <= pages - (e->first_page - region[i].first_page);
	}
	return false;
}

static bool extents_are_sound(const struct extents *extents, const struct state_header *h, const struct region *region)
{
	const struct extent_table *t = &extents->table[extents->current & 1];

	if (t->count > EXTENTS_MAX)
		return false;
	for (uint32_t i = 0; i < t->count; i++) {
		const struct extent *e = &t->entry[i];

		if (!memory_is_sane(e->hva, e->len_bytes, e->page_shift) || !extent_fits(e, h, region))
			return false;
		if (i > 0 && t->entry[i - 1].hva + t->entry[i - 1].len_bytes > e->hva)
			return false;
	}
	return true;
}

bool state_is_sound(const void *state, uint64_t len_bytes)
{
	const struct state_header *h = state;
	const char *base = state;
	const struct region *region;

	if (!layout_is_ours(h, len_bytes))
		return false;
	region = (const struct region *)(base + h->regions_offset);
	return regions_are_sound(h, region) &&
	       extents_are_sound((const struct extents *)(base + h->extents_offset), h, region);
}
