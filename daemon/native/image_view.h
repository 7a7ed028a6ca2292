/*
 * The bytes of a file in memory where they lie: a mapping of it that is only touched where that costs nothing.
 *
 * To touch a hole would fill it, and a page in swap would be waited for without a word: both are left to read(2). So is what
 * lies behind the end of a file that became shorter: touching it is SIGBUS, which is caught while `work` runs.
 */
#ifndef POSTCOPYD_IMAGE_VIEW_H
#define POSTCOPYD_IMAGE_VIEW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* start NULL: there is none. */
struct image_view {
    const uint8_t *start;
    uint64_t len_bytes;
};

typedef void (*image_work_fn)(void *context, const uint8_t *bytes);

/* View the first `len_bytes` of a file on tmpfs; no view of any other, or if the kernel will not say what is in memory. */
void image_view_open(struct image_view *view, int fd, uint64_t len_bytes);
void image_view_close(struct image_view *view);

/*
 * Have `work` look at [offset, offset + len), both multiples of 4096. False: not all of it is in memory, or no longer, and what
 * `work` has done, if it was called, is void. It may be left at any load of those bytes, so it must hold nothing. Any thread.
 */
bool image_view_use(const struct image_view *view, uint64_t offset, size_t len, image_work_fn work, void *context);

#endif
