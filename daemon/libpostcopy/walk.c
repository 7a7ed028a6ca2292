#include "walk.h"

#include <string.h>

#define CR0_PG (1ull << 31)
#define CR4_PSE (1ull << 4)
#define CR4_PAE (1ull << 5)
#define CR4_LA57 (1ull << 12)
#define EFER_LMA (1ull << 10)

#define ENTRY_PRESENT 1ull
#define ENTRY_LARGE (1ull << 7)
#define ENTRY_ADDRESS 0x000ffffffffff000ull

/* How one paging mode takes an address apart. */
struct paging {
	unsigned levels;
	unsigned entry_bytes;
	unsigned index_bits;
	unsigned largest_leaf; /* highest level (0: 4 KiB) at which an entry may be a page */
	unsigned top_bits;     /* index bits of the top level */
	uint64_t root;
};

static struct paging paging_of(const struct kvm_sregs *sregs)
{
	if (sregs->efer & EFER_LMA)
		return (struct paging){ sregs->cr4 & CR4_LA57 ? 5 : 4, 8, 9, 2, 9, sregs->cr3 & ENTRY_ADDRESS };
	if (sregs->cr4 & CR4_PAE)
		return (struct paging){ 3, 8, 9, 1, 2, sregs->cr3 & 0xffffffe0u };
	return (struct paging){ 2, 4, 10, sregs->cr4 & CR4_PSE ? 1 : 0, 10, sregs->cr3 & 0xfffff000u };
}

static uint64_t read_entry(const void *place, unsigned bytes)
{
	uint64_t entry = 0;

	memcpy(&entry, place, bytes);
	return entry;
}

/* The page that an entry of `level` maps, with the rest of the address. */
static uint64_t leaf_address(const struct paging *paging, uint64_t entry, unsigned level, uint64_t linear)
{
	uint64_t mask = (1ull << (12 + level * paging->index_bits)) - 1;

	/* 4 MiB pages of 32-bit paging have address bits 39:32 in bits 20:13 (PSE-36). */
	if (paging->entry_bytes == 4 && level == 1)
		return (entry & 0xffc00000u) | (entry >> 13 & 0xff) << 32 | (linear & mask);
	return (entry & ENTRY_ADDRESS & ~mask) | (linear & mask);
}

static enum walk_result walk_tables(const struct guest_view *view, const struct paging *paging, uint64_t linear,
				    uint64_t *gpa)
{
	uint64_t table = paging->root;

	for (unsigned level = paging->levels; level-- > 0;) {
		unsigned bits = level == paging->levels - 1 ? paging->top_bits : paging->index_bits;
		uint64_t index = linear >> (12 + level * paging->index_bits) & ((1ull << bits) - 1);
		uint64_t at = table + index * paging->entry_bytes, entry;
		const void *place;

		*gpa = at;
		if (view->is_missing(view->context, at))
			return WALK_NEEDS_PAGE;
		place = view->bytes(view->context, at, paging->entry_bytes);
		if (!place)
			return view->translate && view->translate(view->context, linear, gpa) ? WALK_MAPPED : WALK_UNMAPPED;
		entry = read_entry(place, paging->entry_bytes);
		if (!(entry & ENTRY_PRESENT))
			return WALK_UNMAPPED;
		if (level == 0 || (level <= paging->largest_leaf && entry & ENTRY_LARGE)) {
			*gpa = leaf_address(paging, entry, level, linear);
			return WALK_MAPPED;
		}
		table = entry & ENTRY_ADDRESS;
	}
	return WALK_UNMAPPED;
}

enum walk_result walk_linear(const struct guest_view *view, const struct kvm_sregs *sregs, uint64_t linear, uint64_t *gpa)
{
	struct paging paging;

	if (!(sregs->cr0 & CR0_PG)) {
		*gpa = linear;
		return WALK_MAPPED;
	}
	paging = paging_of(sregs);
	if (!(sregs->efer & EFER_LMA))
		linear &= 0xffffffffu;
	return walk_tables(view, &paging, linear, gpa);
}
