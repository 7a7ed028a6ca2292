#define XXH_INLINE_ALL
#include <xxhash.h>

#include "checksum.h"

uint64_t checksum_portable(const void *data, size_t len_bytes, uint64_t offset)
{
	return XXH3_64bits_withSeed(data, len_bytes, offset);
}

uint64_t checksum_run(const void *data, size_t len_bytes, uint64_t offset)
{
#if defined(__x86_64__)
	if (__builtin_cpu_supports("avx2"))
		return checksum_avx2(data, len_bytes, offset);
#endif
	return checksum_portable(data, len_bytes, offset);
}
