// sources: histogram.c
#include <string.h>

#include "check.h"
#include "histogram.h"

static struct histogram h;

static void a_quantile_is_right_to_a_bucket(void)
{
	static const double shares[] = { 0.01, 0.25, 0.5, 0.9, 0.99, 1.0 };

	memset(&h, 0, sizeof(h));
	for (uint64_t ns = 1; ns <= 100000; ns++)
		histogram_add(&h, ns);
	for (size_t i = 0; i < sizeof(shares) / sizeof(shares[0]); i++) {
		double exact = 100000 * shares[i], got = (double)histogram_quantile_ns(&h, shares[i]);

		CHECK(got >= exact);
		CHECK(got <= exact * 1.0626 + 1);
	}
	CHECK_EQ(h.max_ns, 100000);
	CHECK_EQ(h.sum_ns, 100000ull * 100001 / 2);
	CHECK_EQ(histogram_quantile_ns(&h, 1.0), 100000);
}

static void the_largest_and_the_smallest_have_a_bucket(void)
{
	memset(&h, 0, sizeof(h));
	CHECK_EQ(histogram_quantile_ns(&h, 0.5), 0);
	histogram_add(&h, UINT64_MAX);
	CHECK_EQ(histogram_quantile_ns(&h, 0.5), UINT64_MAX);
	CHECK_EQ(h.bucket[HISTOGRAM_BUCKETS - 1], 1);
	histogram_add(&h, 0);
	CHECK_EQ(h.bucket[0], 1);
	CHECK(histogram_quantile_ns(&h, 0.0) <= 1);
}

static void neighbouring_buckets_touch(void)
{
	uint64_t last = 0;

	/* Every power of two, one less and one more: buckets must ascend with the duration. */
	for (unsigned bit = 0; bit < 64; bit++) {
		for (int64_t d = -1; d <= 1; d++) {
			uint64_t ns = (1ull << bit) + (uint64_t)d, bucket = 0;

			memset(&h, 0, sizeof(h));
			histogram_add(&h, ns);
			while (h.bucket[bucket] == 0)
				bucket++;
			if (bit > 5) {
				CHECK(bucket >= last);
				last = bucket;
			}
		}
	}
}

static void octaves_hold_all(void)
{
	uint64_t counts[32], sum = 0;

	memset(&h, 0, sizeof(h));
	histogram_add(&h, 10);		   /* below a microsecond */
	histogram_add(&h, 1500);	   /* 1 µs */
	histogram_add(&h, 3000000);	   /* 3 ms: 2^11 µs = 2.048 ms */
	histogram_add(&h, UINT64_MAX / 2); /* above all */
	histogram_log2_us(&h, counts, 32);
	for (int i = 0; i < 32; i++)
		sum += counts[i];
	CHECK_EQ(sum, 4);
	CHECK_EQ(counts[0], 2);
	CHECK_EQ(counts[11], 1);
	CHECK_EQ(counts[31], 1);
}

int main(void)
{
	a_quantile_is_right_to_a_bucket();
	the_largest_and_the_smallest_have_a_bucket();
	neighbouring_buckets_touch();
	octaves_hold_all();
	return 0;
}
