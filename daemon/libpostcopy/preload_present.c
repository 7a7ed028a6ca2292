/* Hybrid start: what was copied into the RAM file beforehand stays, if the bitmap says that it is good.
 *
 * A page in the file never faults, so one that the bitmap does not name would stay as it is: an older content. Hence every
 * such page is taken out of the file before the guest can see it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <string.h>
#include <unistd.h>

#include "preload.h"

#define BITMAP_PAGE 4096u
#define CHUNK_BYTES 4096u

struct bitmap {
	int fd;
	uint64_t start; /* of the chunk in `bits`, bytes */
	uint8_t bits[CHUNK_BYTES];
};

/* What lies behind the end of the file is not set. */
static bool bit_is_set(struct bitmap *bitmap, uint64_t bit)
{
	uint64_t byte = bit / 8, start = byte - byte % CHUNK_BYTES;

	if (start != bitmap->start) {
		ssize_t got = pread(bitmap->fd, bitmap->bits, CHUNK_BYTES, (off_t)start);

		if (got < 0)
			preload_fail("%s cannot be read: %s", preload.present, strerror(errno));
		memset(bitmap->bits + got, 0, CHUNK_BYTES - (size_t)got);
		bitmap->start = start;
	}
	return bitmap->bits[byte - start] >> (bit % 8) & 1;
}

/* A huge page is good if every part of it is. */
static bool page_is_good(struct bitmap *bitmap, uint64_t offset, uint64_t page_size)
{
	for (uint64_t part = 0; part < page_size; part += BITMAP_PAGE) {
		if (!bit_is_set(bitmap, (offset + part) / BITMAP_PAGE))
			return false;
	}
	return true;
}

static void empty(const struct preload_block *block, int fd, uint64_t start, uint64_t end)
{
	if (start < end &&
	    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)start, (off_t)(end - start)))
		preload_fail("old pages of %s cannot be taken out: %s", block->ram, strerror(errno));
}

void present_keep(const struct preload_block *block, int fd, uint64_t size)
{
	struct bitmap bitmap = { .fd = open(preload.present, O_RDONLY | O_CLOEXEC), .start = UINT64_MAX };
	uint64_t bad = 0; /* where pages begin that are not good */

	if (bitmap.fd < 0)
		preload_fail("%s cannot be read: %s", preload.present, strerror(errno));
	for (uint64_t offset = 0; offset < size; offset += block->page_size) {
		if (!page_is_good(&bitmap, offset, block->page_size))
			continue;
		empty(block, fd, bad, offset);
		bad = offset + block->page_size;
	}
	empty(block, fd, bad, size);
	close(bitmap.fd);
}
