#include "vmm_walk.h"

uint64_t walk_rank(const struct walk_slice *slice, uint64_t position)
{
	/* x ^= x >> shift undoes itself, as 2 * shift >= bits. */
	uint64_t x = position ^ (position >> slice->shift);

	x = (x * slice->inverse) & slice->mask;
	x ^= x >> slice->shift;
	return (x * slice->inverse) & slice->mask;
}

uint64_t walk_counter(const struct walk_slice *slice, const struct vmm_walk *walk, uint64_t position)
{
	uint64_t now = walk->tick & slice->mask;
	uint64_t rank = walk_rank(slice, position);

	return walk_pass(slice, walk->tick) + (rank < now || (rank == now && walk->visited));
}

/* The inverse of an odd number modulo 2^64: each Newton step doubles the number of right bits, and x * x = 1 mod 8. */
static uint64_t inverse_of(uint64_t odd)
{
	uint64_t x = odd;

	for (int right_bits = 3; right_bits < 64; right_bits *= 2)
		x *= 2 - odd * x;
	return x;
}

static unsigned bits_for(uint64_t pages)
{
	unsigned bits = 0;

	while ((UINT64_C(1) << bits) < pages)
		bits++;
	return bits;
}

struct walk_slice walk_slice_of(const struct vmm_shape *shape, unsigned vcpu)
{
	uint64_t pages = walk_pages(shape);
	uint64_t first = pages * vcpu / shape->vcpus;
	struct walk_slice slice = {
		.first = first,
		.pages = pages * (vcpu + 1) / shape->vcpus - first,
		.multiplier = 1,
		.inverse = 1,
		.shift = 63,
	};

	slice.bits = bits_for(slice.pages);
	slice.mask = (UINT64_C(1) << slice.bits) - 1;
	if (shape->order == VMM_ORDER_RANDOM && slice.bits > 1) {
		slice.multiplier = WALK_SCATTER;
		slice.inverse = inverse_of(WALK_SCATTER);
		slice.shift = (slice.bits + 1) / 2;
	}
	return slice;
}

uint64_t walk_limit(const struct vmm_shape *shape, const struct walk_slice *slice)
{
	return shape->passes == 0 ? UINT64_MAX : shape->passes << slice->bits;
}
