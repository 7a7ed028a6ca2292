#include "histogram.h"

static unsigned bucket_of(uint64_t ns)
{
	unsigned octave;

	if (ns < 16)
		return (unsigned)ns;
	octave = 63 - (unsigned)__builtin_clzll(ns);
	return (octave - 3) * 16 + (unsigned)(ns >> (octave - 4) & 15);
}

/* One past the largest duration of the bucket. */
static uint64_t bucket_end(unsigned bucket)
{
	unsigned octave = bucket / 16 + 3;

	if (bucket < 16)
		return bucket + 1;
	return (uint64_t)(16 + bucket % 16 + 1) << (octave - 4);
}

void histogram_add(struct histogram *h, uint64_t ns)
{
	h->bucket[bucket_of(ns)]++;
	h->count++;
	h->sum_ns += ns;
	if (ns > h->max_ns)
		h->max_ns = ns;
}

uint64_t histogram_quantile_ns(const struct histogram *h, double share)
{
	uint64_t wanted = (uint64_t)((double)h->count * share + 0.999999), seen = 0;

	if (h->count == 0)
		return 0;
	for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
		seen += h->bucket[i];
		if (seen >= wanted && seen > 0) {
			uint64_t edge = bucket_end(i);

			return edge && edge < h->max_ns ? edge : h->max_ns;
		}
	}
	return h->max_ns;
}

void histogram_log2_us(const struct histogram *h, uint64_t *counts, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		counts[i] = 0;
	for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
		uint64_t us = (bucket_end(i) - 1) / 1000;
		unsigned octave = us ? 63 - (unsigned)__builtin_clzll(us) : 0;

		if (h->bucket[i])
			counts[octave < n ? octave : n - 1] += h->bucket[i];
	}
}
