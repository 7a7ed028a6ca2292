// sources: pager_present.c
/* A bitmap of pages in place becomes the runs that it means, whatever its bytes. */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "pager.h"

#define BYTES 64u

static uint8_t marked[BYTES * 8];
static unsigned calls;

/* The pager's own is tested in test_pager.c: here only what it is told counts. */
void pager_mark_present(struct pager *pager, uint64_t offset, uint64_t len_bytes)
{
	(void)pager;
	CHECK(offset % 4096 == 0 && len_bytes % 4096 == 0 && len_bytes > 0);
	CHECK(offset / 4096 + len_bytes / 4096 <= sizeof marked);
	for (uint64_t page = offset / 4096; page < (offset + len_bytes) / 4096; page++)
		marked[page]++;
	calls++;
}

static void check_bitmap(const uint8_t *bitmap, uint64_t len)
{
	unsigned runs = 0;

	memset(marked, 0, sizeof marked);
	calls = 0;
	pager_mark_present_bitmap(NULL, bitmap, len);
	for (uint64_t page = 0; page < len * 8; page++) {
		bool set = bitmap[page / 8] >> (page % 8) & 1;

		CHECK(marked[page] == set);
		runs += set && (page == 0 || !(bitmap[(page - 1) / 8] >> ((page - 1) % 8) & 1));
	}
	/* Nothing behind its end. */
	for (uint64_t page = len * 8; page < sizeof marked; page++)
		CHECK(marked[page] == 0);
	CHECK(calls == runs);
}

static void every_bitmap_of_two_bytes(void)
{
	for (unsigned value = 0; value < 1u << 16; value++) {
		uint8_t bitmap[2] = { (uint8_t)value, (uint8_t)(value >> 8) };

		check_bitmap(bitmap, 2);
	}
}

static void long_ones_with_full_and_empty_bytes(void)
{
	uint8_t bitmap[BYTES];

	srand(1);
	for (unsigned round = 0; round < 2000; round++) {
		for (unsigned i = 0; i < BYTES; i++) {
			unsigned kind = (unsigned)rand() % 4;

			bitmap[i] = kind == 0 ? 0 : kind == 1 ? 0xff : (uint8_t)rand();
		}
		check_bitmap(bitmap, BYTES - round % 3);
	}
}

static void an_empty_bitmap_marks_nothing(void)
{
	check_bitmap(NULL, 0);
}

int main(void)
{
	every_bitmap_of_two_bytes();
	long_ones_with_full_and_empty_bytes();
	an_empty_bitmap_marks_nothing();
	return 0;
}
