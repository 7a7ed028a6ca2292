// sources: zero.c
#include "zero.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* Every single bit of a page counts, at any alignment. */
static void one_bit_anywhere_is_not_zero(size_t alignment)
{
    enum { LEN = 4096 };
    uint8_t *memory = calloc(1, LEN + alignment);
    uint8_t *page = memory + alignment;

    assert(is_zero(page, LEN));
    for (size_t i = 0; i < LEN * 8; i++) {
        page[i / 8] = (uint8_t)(1 << i % 8);
        assert(!is_zero(page, LEN));
        page[i / 8] = 0;
    }
    assert(is_zero(page, LEN));
    free(memory);
}

/* What lies around the memory that is asked about does not matter. */
static void neighbours_do_not_count(void)
{
    uint8_t memory[256 + 4096 + 256];

    memset(memory, 0xff, sizeof memory);
    memset(memory + 256, 0, 4096);
    assert(is_zero(memory + 256, 4096));
    assert(!is_zero(memory + 255, 4096));
    assert(!is_zero(memory + 257, 4096));
}

static void huge_pages(void)
{
    enum { HUGE = 2 << 20 };
    uint8_t *page = calloc(1, HUGE);

    assert(is_zero(page, HUGE));
    page[HUGE - 1] = 1;
    assert(!is_zero(page, HUGE));
    free(page);
}

/* For each pattern of ten blocks: the runs are the longest there are, alternate, and cover everything. */
static void runs_are_maximal(size_t block)
{
    enum { BLOCKS = 10 };
    uint8_t *pages = calloc(BLOCKS, block);

    for (unsigned pattern = 0; pattern < 1 << BLOCKS; pattern++) {
        for (unsigned i = 0; i < BLOCKS; i++)
            pages[i * block + (i * 97 + 5) % block] = pattern >> i & 1;
        for (size_t at = 0; at < BLOCKS;) {
            bool zero;
            size_t run = run_length(pages + at * block, (BLOCKS - at) * block, block, &zero) / block;
            for (size_t i = at; i < at + run; i++)
                assert((pattern >> i & 1) == !zero);
            at += run;
            assert(at == BLOCKS || (pattern >> at & 1) == zero);
        }
    }
    free(pages);
}

int main(void)
{
    one_bit_anywhere_is_not_zero(0);
    one_bit_anywhere_is_not_zero(1);
    one_bit_anywhere_is_not_zero(29);
    neighbours_do_not_count();
    huge_pages();
    runs_are_maximal(4096);
    runs_are_maximal(512);
    return 0;
}
