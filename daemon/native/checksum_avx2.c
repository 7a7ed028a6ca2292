/* XXH3 compiled for AVX2: a file of its own, as the pragma must come before the header. */
#if defined(__x86_64__)
#pragma GCC target("avx2")
#define XXH_VECTOR 2 /* XXH_AVX2, which the header defines only later */
#endif
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "checksum.h"

uint64_t checksum_avx2(const void *data, size_t len_bytes, uint64_t offset)
{
	return XXH3_64bits_withSeed(data, len_bytes, offset);
}
