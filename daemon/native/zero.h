/* Finding zero memory, and cutting a buffer of pages into runs of one kind. */
#ifndef POSTCOPYD_ZERO_H
#define POSTCOPYD_ZERO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* True if all of `len` bytes are zero. Any alignment; len is a multiple of 256. */
bool is_zero(const void *memory, size_t len);

/*
 * Length of the longest run of blocks of one kind at the start of `pages`; *zero says which kind. Bytes, a
 * multiple of `block`. len > 0; len and block are multiples of 256, len of block.
 */
size_t run_length(const void *pages, size_t len, size_t block, bool *zero);

#endif
