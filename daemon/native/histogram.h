/* A log-linear histogram of durations: 16 buckets an octave, so a quantile is right to 6 %. Fixed size, no allocation. */
#ifndef POSTCOPY_HISTOGRAM_H
#define POSTCOPY_HISTOGRAM_H

#include <stdint.h>

#define HISTOGRAM_BUCKETS 976 /* 16 for 0..15 ns, then 16 for each of 60 octaves */

struct histogram {
	uint64_t count;
	uint64_t sum_ns;
	uint64_t max_ns;
	uint64_t bucket[HISTOGRAM_BUCKETS];
};

void histogram_add(struct histogram *histogram, uint64_t ns);

/* The least duration that at least `share` (0..1) of all do not exceed: upper edge of its bucket, at most max_ns. */
uint64_t histogram_quantile_ns(const struct histogram *histogram, double share);

/* counts[i] = durations in [2^i, 2^(i+1)) µs for i < n - 1; the first also holds those below, the last all above. Edges
 * are right to a bucket, 6 %. */
void histogram_log2_us(const struct histogram *histogram, uint64_t *counts, unsigned n);

#endif
