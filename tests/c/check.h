/* What a test program needs: CHECK ends it with the place and the condition. */
#ifndef POSTCOPY_TESTS_CHECK_H
#define POSTCOPY_TESTS_CHECK_H

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                              \
	do {                                                                                          \
		if (!(condition)) {                                                                   \
			fprintf(stderr, "%s:%d: %s: not true: %s\n", __FILE__, __LINE__, __func__, #condition); \
			exit(1);                                                                      \
		}                                                                                     \
	} while (0)

#define CHECK_EQ(left, right)                                                                         \
	do {                                                                                          \
		uint64_t left_ = (uint64_t)(left), right_ = (uint64_t)(right);                        \
		if (left_ != right_) {                                                                \
			fprintf(stderr, "%s:%d: %s: %s is %" PRIu64 ", not %s, %" PRIu64 "\n", __FILE__, __LINE__, \
				__func__, #left, left_, #right, right_);                              \
			exit(1);                                                                      \
		}                                                                                     \
	} while (0)

/* A repeatable sequence (xorshift64): a failure comes again. */
static inline uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

#endif
