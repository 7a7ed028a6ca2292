/*
 * An image: one open file that holds a machine's memory. What of a file in memory is there is looked at where it lies
 * (image_view.h), everything else is read by pread. A short read is an error and never zeros.
 *
 * Functions that read return a count, or a negative errno; three of them have a meaning of their own:
 *   IMAGE_SHRANK       the file is shorter than when it was opened
 *   IMAGE_RELEASED     image_release was called
 *   IMAGE_WOULD_BLOCK  the bytes are not in memory and the caller asked not to wait
 *
 * Thread safety: all functions but image_free may be called by any thread at any time. The descriptor is
 * closed by image_release or, when a read is under way in another thread, at the end of that read.
 */
#ifndef POSTCOPYD_IMAGE_H
#define POSTCOPYD_IMAGE_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "image_view.h"

#define IMAGE_PAGE 4096u

enum {
    IMAGE_WOULD_BLOCK = -EAGAIN,
    IMAGE_SHRANK = -ENODATA,
    IMAGE_RELEASED = -ESTALE,
    /* From image_open only. */
    IMAGE_NOT_A_FILE = -EMEDIUMTYPE,
    IMAGE_EMPTY = -ENOMSG,
    IMAGE_UNALIGNED = -EBADMSG,
};

struct image;

/* What was served from an image. Bytes; `messages` is a count. */
struct image_served {
    uint64_t data;
    uint64_t zero;
    uint64_t messages;
};

/*
 * Open a file whose size is a multiple of IMAGE_PAGE. epoch 0: derived from the file's identity and version
 * (st_dev, st_ino, st_size, st_mtime), so that the same file served again keeps it. NULL and *error < 0 on
 * failure.
 */
struct image *image_open(const char *path, uint64_t epoch, int *error);

/* Close the file as soon as no read is under way; later reads answer IMAGE_RELEASED. Idempotent. */
void image_release(struct image *image);

/* Nobody may use the image any more. */
void image_free(struct image *image);

uint64_t image_size(const struct image *image);
uint64_t image_epoch(const struct image *image);
/* Page size of the file's own backing: 4096, or the huge page size on hugetlbfs. */
uint32_t image_page_size(const struct image *image);
/* The file lives in memory (tmpfs, memfd, hugetlbfs, ramfs): reading never waits for a disk. */
bool image_in_memory(const struct image *image);
/* The file system tells holes from data. */
bool image_has_holes(const struct image *image);
bool image_is_released(const struct image *image);

/*
 * Read `len` bytes at `offset`, both multiples of IMAGE_PAGE. wait: returns len or an error. Otherwise a
 * file that is not in memory is read with RWF_NOWAIT: returns the bytes that were cached, at least one page
 * of them, or IMAGE_WOULD_BLOCK.
 */
ssize_t image_read(struct image *image, void *out, size_t len, uint64_t offset, bool wait);

/* Have `work` look at the bytes where they lie, if that can be done now (image_view_use); else false: image_read says why. */
bool image_look(struct image *image, uint64_t offset, size_t len, image_work_fn work, void *context);

/*
 * Offset of the first page at or after `offset` that is not in a hole, or the image's size when there is
 * none; a negative errno on failure. Asked of the kernel each time: a cached map would call pages zero that
 * were written since.
 */
int64_t image_next_data(struct image *image, uint64_t offset);

/*
 * Up to `max` holes from *cursor on, as (offset, length) pairs, whole pages, ascending. Advances *cursor,
 * to the image's size after the last. Returns the number of pairs (0 with *cursor below the size is
 * possible: go on) or a negative errno.
 */
ssize_t image_holes(struct image *image, uint64_t *cursor, uint64_t *pairs, size_t max);

void image_count(struct image *image, uint64_t data, uint64_t zero);
struct image_served image_served(const struct image *image);

#endif
