/*
 * One read that has to wait for a disk, done by another thread into a buffer of its own, so that neither
 * the event loop nor the stream's queues wait with it. A stream has at most one.
 *
 *   IDLE → WANTED     cold_read_want, by the stream's thread
 *   WANTED → READING  cold_read_run, by any thread; others that call it then do nothing
 *   READING → READY   the same thread, when it has the bytes or an error
 *   READY → IDLE      cold_read_take or cold_read_want, by the stream's thread
 */
#ifndef POSTCOPYD_COLD_READ_H
#define POSTCOPYD_COLD_READ_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "image.h"

enum cold_read_state { COLD_READ_IDLE, COLD_READ_WANTED, COLD_READ_READING, COLD_READ_READY };

struct cold_read {
    _Atomic int state;
    struct image *image;
    uint64_t offset;
    size_t len;
    uint64_t min_hole;
    uint8_t *buffer;
    size_t capacity;
    /*
     * While READY: bytes read, or a negative errno; or, when hole_end is not 0, nothing was read as it is a
     * hole up to there.
     */
    ssize_t result;
    uint64_t hole_end;
};

void cold_read_init(struct cold_read *cold);
/* No thread may be in cold_read_run. */
void cold_read_deinit(struct cold_read *cold);

/* WANTED or READING: somebody will call, or is in, cold_read_run. */
bool cold_read_is_pending(const struct cold_read *cold);

/*
 * Not while pending. Drops an earlier result. A hole shorter than min_hole is read like data. False: no
 * memory.
 */
bool cold_read_want(struct cold_read *cold, struct image *image, uint64_t offset, size_t len, uint64_t min_hole);

/* Do the read that is wanted, if one is. Waits for the disk. */
void cold_read_run(struct cold_read *cold);

/* True when READY with an answer for `offset`. */
bool cold_read_has(const struct cold_read *cold, uint64_t offset);
/* After cold_read_has: the result is used, IDLE again. The buffer stays valid until the next cold_read_want. */
void cold_read_take(struct cold_read *cold);

#endif
