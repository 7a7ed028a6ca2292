// sources: ../libpostcopy/walk.c
#include <stdbool.h>
#include <string.h>

#include "../../daemon/libpostcopy/walk.h"
#include "check.h"

#define MEMORY 0x20000u
#define NO_PAGE UINT64_MAX

#define PAGED (1ull << 31)
#define PSE (1ull << 4)
#define PAE (1ull << 5)
#define LA57 (1ull << 12)
#define LONG_MODE (1ull << 10)

static struct {
	uint8_t memory[MEMORY];
	uint64_t missing;    /* page that is not there */
	uint64_t unreadable; /* page that only the kernel can read */
	unsigned reads;
} guest;

static bool is_missing(void *context, uint64_t gpa)
{
	(void)context;
	return gpa / 4096 == guest.missing / 4096;
}

static const void *bytes(void *context, uint64_t gpa, size_t len)
{
	(void)context;
	guest.reads++;
	if (gpa / 4096 == guest.unreadable / 4096 || gpa + len > MEMORY)
		return NULL;
	return guest.memory + gpa;
}

static bool translate(void *context, uint64_t linear, uint64_t *gpa)
{
	(void)context;
	*gpa = 0xabc000 | (linear & 0xfff);
	return linear < 1ull << 32;
}

static const struct guest_view view = { NULL, is_missing, bytes, translate };

static void put(uint64_t at, uint64_t entry, unsigned len)
{
	memcpy(guest.memory + at, &entry, len);
}

static void clear(void)
{
	memset(&guest, 0, sizeof(guest));
	guest.missing = guest.unreadable = NO_PAGE;
}

static void expect(const struct kvm_sregs *sregs, uint64_t linear, enum walk_result result, uint64_t expected)
{
	uint64_t gpa = 0;

	CHECK_EQ(walk_linear(&view, sregs, linear, &gpa), result);
	if (result != WALK_UNMAPPED)
		CHECK_EQ(gpa, expected);
}

/* 4-level: 0x1000 → 0x2000 → 0x3000 → 0x4000, every index another. */
#define FOUR_LEVEL_LINEAR (0xffff800000000000ull | 3ull << 30 | 5ull << 21 | 7ull << 12 | 0x123)

static struct kvm_sregs four_levels(void)
{
	clear();
	put(0x1000 + 256 * 8, 0x2007, 8);
	put(0x2000 + 3 * 8, 0x3007, 8);
	put(0x3000 + 5 * 8, 0x4007, 8);
	put(0x4000 + 7 * 8, 0x8000000000055067ull, 8); /* no-execute is not part of the address */
	/* The low bits of CR3 are a PCID, not an address. */
	return (struct kvm_sregs){ .cr0 = PAGED, .cr3 = 0x1abc, .cr4 = PAE, .efer = LONG_MODE };
}

static void four_levels_lead_to_the_page(void)
{
	struct kvm_sregs sregs = four_levels();

	expect(&sregs, FOUR_LEVEL_LINEAR, WALK_MAPPED, 0x55123);
	expect(&sregs, FOUR_LEVEL_LINEAR + 4096, WALK_UNMAPPED, 0);
	expect(&sregs, FOUR_LEVEL_LINEAR + (1ull << 21), WALK_UNMAPPED, 0);
	expect(&sregs, 0, WALK_UNMAPPED, 0);
}

static void a_missing_table_of_any_level_is_what_is_needed(void)
{
	for (uint64_t table = 0x1000; table <= 0x4000; table += 0x1000) {
		struct kvm_sregs sregs = four_levels();
		static const unsigned index[] = { 256, 3, 5, 7 };

		guest.missing = table;
		expect(&sregs, FOUR_LEVEL_LINEAR, WALK_NEEDS_PAGE, table + index[table / 0x1000 - 1] * 8);
		/* It was not read: that would have waited for it. */
		CHECK_EQ(guest.reads, table / 0x1000 - 1);
	}
}

static void a_table_that_only_the_kernel_can_read_is_the_kernels_to_walk(void)
{
	struct kvm_sregs sregs = four_levels();
	struct guest_view without = view;
	uint64_t gpa;

	guest.unreadable = 0x3000;
	put(0x1000, 0x2007, 8);
	put(0x2000, 0x3007, 8);
	expect(&sregs, 0x5123, WALK_MAPPED, 0xabc123);
	expect(&sregs, FOUR_LEVEL_LINEAR, WALK_UNMAPPED, 0);
	without.translate = NULL;
	CHECK_EQ(walk_linear(&without, &sregs, 0x5123, &gpa), WALK_UNMAPPED);
}

static void large_pages_end_the_walk(void)
{
	struct kvm_sregs sregs = four_levels();

	put(0x3000 + 5 * 8, 0x40000000ull | 0xe7, 8);
	expect(&sregs, FOUR_LEVEL_LINEAR, WALK_MAPPED, 0x40000000ull + 7 * 4096 + 0x123);
	put(0x2000 + 3 * 8, 0x80000000ull | 0xe7, 8);
	expect(&sregs, FOUR_LEVEL_LINEAR, WALK_MAPPED, 0x80000000ull + (5ull << 21) + 7 * 4096 + 0x123);
	/* Bit 7 in the top level is reserved, no size. */
	put(0x1000 + 256 * 8, 0x2087, 8);
	expect(&sregs, FOUR_LEVEL_LINEAR, WALK_MAPPED, 0x80000000ull + (5ull << 21) + 7 * 4096 + 0x123);
}

static void five_levels_have_one_more(void)
{
	struct kvm_sregs sregs = four_levels();

	put(0x5000 + 9 * 8, 0x1007, 8);
	sregs.cr3 = 0x5000;
	sregs.cr4 |= LA57;
	expect(&sregs, (FOUR_LEVEL_LINEAR & 0x0000ffffffffffffull) | 9ull << 48, WALK_MAPPED, 0x55123);
}

static void pae_has_four_entries_at_the_top(void)
{
	struct kvm_sregs sregs = { .cr0 = PAGED, .cr3 = 0x1020, .cr4 = PAE };

	clear();
	put(0x1020 + 2 * 8, 0x2001, 8);
	put(0x2000 + 5 * 8, 0x3007, 8);
	put(0x3000 + 7 * 8, 0x1200055007ull, 8);
	put(0x2000 + 6 * 8, 0x600000ull | 0xe7, 8);
	expect(&sregs, 2u << 30 | 5u << 21 | 7u << 12 | 0x321, WALK_MAPPED, 0x1200055321ull);
	expect(&sregs, 2u << 30 | 6u << 21 | 0x54321, WALK_MAPPED, 0x654321);
	/* Addresses wrap at 4 GiB. */
	expect(&sregs, 1ull << 32 | 2u << 30 | 5u << 21 | 7u << 12, WALK_MAPPED, 0x1200055000ull);
}

static void two_levels_of_32_bits(void)
{
	struct kvm_sregs sregs = { .cr0 = PAGED, .cr3 = 0x1018, .cr4 = PSE };

	clear();
	put(0x1000 + 1023 * 4, 0x2007, 4);
	put(0x1000 + 1022 * 4, 0xffffffff, 4); /* rubbish beside it, which an 8-byte read would see */
	put(0x2000 + 1 * 4, 0x55007, 4);
	put(0x1000 + 4 * 4, 0x01c0e087, 4); /* 4 MiB, address bits 39:32 = 7 */
	expect(&sregs, 1023u << 22 | 1u << 12 | 0xabc, WALK_MAPPED, 0x55abc);
	expect(&sregs, 4u << 22 | 0x12345, WALK_MAPPED, 0x701c12345ull);
	sregs.cr4 = 0;
	guest.missing = 0x01c0e000;
	expect(&sregs, 4u << 22 | 0x12345, WALK_NEEDS_PAGE, 0x01c0e000 + 0x12 * 4);
}

static void without_paging_an_address_is_physical(void)
{
	struct kvm_sregs sregs = { 0 };

	clear();
	expect(&sregs, 0xfff0, WALK_MAPPED, 0xfff0);
	CHECK_EQ(guest.reads, 0);
}

int main(void)
{
	four_levels_lead_to_the_page();
	a_missing_table_of_any_level_is_what_is_needed();
	a_table_that_only_the_kernel_can_read_is_the_kernels_to_walk();
	large_pages_end_the_walk();
	five_levels_have_one_more();
	pae_has_four_entries_at_the_top();
	two_levels_of_32_bits();
	without_paging_an_address_is_physical();
	return 0;
}
