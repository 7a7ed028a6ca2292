/*
 * The guest's walk as arithmetic: what every page holds, in which order a vCPU visits its pages, and what a page's
 * counter is at any instant. Pure functions of the shape, shared by the fill, the checker and the process guest; the
 * machine code in vmm_guest.c computes the same in registers.
 *
 * Pages. h = hash(index, seed) is a bijection of the index, so no two pages share it. The top three bits of h say what
 * the page is: 0 zero page, 1 static page, else counter page. A counter page begins with h as its id, then the
 * counter; all other words of counter and static pages are word(h, position). The guest walks the first
 * (memory_bytes - spare_bytes) / 4096 pages; what would be a counter page above is a static one.
 *
 * Order. vCPU v owns one contiguous slice of n pages, and bits is the smallest number with 2^bits >= n. A tick is one
 * step: pass = tick >> bits, and position = scatter(tick mod 2^bits), a bijection of bits-bit numbers (identity when
 * sequential). Positions from n on are skipped, so every page is visited exactly once a pass, and `tick` is the
 * walk's whole state.
 */
#ifndef VMM_WALK_H
#define VMM_WALK_H

#include <stdbool.h>
#include <stdint.h>

#include "vmm.h"

#define VMM_PAGE 4096u
#define VMM_PAGE_WORDS (VMM_PAGE / sizeof(uint64_t))

/* Odd constants of good avalanche (splitmix64); vmm_guest.c uses the same. */
#define WALK_STRIDE 0x9e3779b97f4a7c15u
#define WALK_MIX_1 0xbf58476d1ce4e5b9u
#define WALK_MIX_2 0x94d049bb133111ebu
#define WALK_SCATTER 0x2545f4914f6cdd1du

enum walk_kind { WALK_ZERO, WALK_STATIC, WALK_COUNTER };

/* One vCPU's share. shift is 63 and multiplier 1 where the order is sequential: scatter is then the identity. */
struct walk_slice {
	uint64_t first;
	uint64_t pages;
	uint64_t mask;
	uint64_t multiplier;
	uint64_t inverse;
	unsigned bits;
	unsigned shift;
};

static inline uint64_t walk_hash(uint64_t index, uint64_t seed)
{
	uint64_t h = index * WALK_STRIDE + seed;

	h = (h ^ (h >> 32)) * WALK_MIX_1;
	h = (h ^ (h >> 29)) * WALK_MIX_2;
	return h ^ (h >> 32);
}

static inline enum walk_kind walk_kind_of(uint64_t hash)
{
	uint64_t top = hash >> 61;

	return top == 0 ? WALK_ZERO : top == 1 ? WALK_STATIC : WALK_COUNTER;
}

static inline uint64_t walk_word(uint64_t hash, uint64_t position)
{
	return (hash ^ (position * WALK_STRIDE)) * WALK_MIX_2 + position;
}

static inline uint64_t walk_pages(const struct vmm_shape *shape)
{
	return (shape->memory_bytes - shape->spare_bytes) / VMM_PAGE;
}

static inline uint64_t walk_pass(const struct walk_slice *slice, uint64_t tick)
{
	return tick >> slice->bits;
}

/* The position within the slice that `tick` visits; one of slice->pages or more is skipped. */
static inline uint64_t walk_position(const struct walk_slice *slice, uint64_t tick)
{
	uint64_t x = tick & slice->mask;

	x = (x * slice->multiplier) & slice->mask;
	x ^= x >> slice->shift;
	x = (x * slice->multiplier) & slice->mask;
	return x ^ (x >> slice->shift);
}

/* The tick within its pass at which `position` is visited: the inverse of walk_position. */
uint64_t walk_rank(const struct walk_slice *slice, uint64_t position);

/* The counter of the page at `position` when the walk stands at `walk`. */
uint64_t walk_counter(const struct walk_slice *slice, const struct vmm_walk *walk, uint64_t position);

struct walk_slice walk_slice_of(const struct vmm_shape *shape, unsigned vcpu);

/* The tick at which the walk ends; UINT64_MAX where shape->passes is 0. */
uint64_t walk_limit(const struct vmm_shape *shape, const struct walk_slice *slice);

#endif
