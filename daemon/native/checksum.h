/* The checksum of a run: XXH3-64 of its data with its image offset as the seed, so that a right page for the wrong place
 * fails like a wrong page. Source: protos/postcopyd/v1/page_source.proto, Run.xxh3_64. */
#ifndef POSTCOPY_CHECKSUM_H
#define POSTCOPY_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

/* With the widest vectors that this processor has; the result does not depend on them. */
uint64_t checksum_run(const void *data, size_t len_bytes, uint64_t offset);

/* The same by one way of computing it, for the tests. avx2: only where the processor has it. */
uint64_t checksum_portable(const void *data, size_t len_bytes, uint64_t offset);
uint64_t checksum_avx2(const void *data, size_t len_bytes, uint64_t offset);

#endif
