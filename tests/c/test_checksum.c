// sources: checksum.c checksum_avx2.c
/* Every way of computing the checksum gives the same. */
#include "check.h"
#include "checksum.h"

#include <stdlib.h>

int main(void)
{
	static uint8_t data[300000];

	for (size_t i = 0; i < sizeof(data); i++)
		data[i] = (uint8_t)(i * 2654435761u >> 13);
	for (size_t len = 0; len <= sizeof(data); len = len < 600 ? len + 1 : len * 2 + 37) {
		uint64_t portable = checksum_portable(data, len, len * 4096);

		CHECK_EQ(checksum_run(data, len, len * 4096), portable);
		CHECK(checksum_run(data, len, len * 4096 + 1) != portable);
#if defined(__x86_64__)
		if (__builtin_cpu_supports("avx2"))
			CHECK_EQ(checksum_avx2(data, len, len * 4096), portable);
#endif
	}
	return 0;
}
