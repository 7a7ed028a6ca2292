/*
 * The serving end of one postcopyd.v1.PageSource/Pages call, sans-IO but for reading the image: serialised
 * PageRequests go in, serialised PageReplies come out.
 *
 * Demand is answered before prefetch, prefetch before bulk, first in first out within each. One message
 * holds answers of one priority, and a long range is answered a slice at a time, so a demand that arrives
 * meanwhile goes out with the next message.
 *
 * Thread safety: ps_request, ps_produce and the accessors belong to one thread at a time. Only
 * ps_read_blocking may run in another thread meanwhile; ps_free must wait for it.
 *
 * The functions take `void *`, so that a transport can be given their addresses and knows nothing of this
 * file.
 */
#ifndef POSTCOPYD_PAGE_STREAM_H
#define POSTCOPYD_PAGE_STREAM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "image_catalog.h"

/* gRPC status codes that a stream ends with. */
enum ps_status {
    PS_OK = 0,
    PS_INVALID_ARGUMENT = 3,
    PS_NOT_FOUND = 5,
    PS_RESOURCE_EXHAUSTED = 8,
    PS_FAILED_PRECONDITION = 9,
    PS_OUT_OF_RANGE = 11,
    PS_INTERNAL = 13,
    PS_DATA_LOSS = 15,
};

/* No status: CANCELLED is never reported by a stream. */
#define PS_WOULD_BLOCK (-1)

#define PS_REQUEST_MAX (256u << 10)
#define PS_RUN_ALIGN_MAX (2u << 20)
/* What a message may have beyond its data. */
#define PS_MESSAGE_OVERHEAD (64u << 10)

struct ps_limits {
    uint32_t max_ranges;
    uint32_t max_data_bytes;
    uint64_t max_range_bytes;
};

/* The catalogue outlives the stream. NULL: no memory. */
void *ps_new(const struct image_catalog *catalog, struct ps_limits limits);
void ps_free(void *stream);

/* End the stream before it began: every later call answers this gRPC status, not 0, with this message. */
void ps_refuse(void *stream, int status, const char *message);

/*
 * Take a serialised PageRequest. Returns 0 or the gRPC status that ends the stream, which every later call
 * then repeats. Bounded: a message of more than PS_REQUEST_MAX bytes, or with more ranges than max_ranges
 * outstanding, is RESOURCE_EXHAUSTED. A priority that is absent or not known is bulk.
 */
int ps_request(void *stream, const uint8_t *message, size_t len);

/*
 * Write the next serialised PageReply to `out`, `cap` bytes. Never waits for a disk. Returns
 *   > 0             bytes written
 *   0               nothing to do until the next ps_request, or until ps_read_blocking returns if it is under way
 *   PS_WOULD_BLOCK  call ps_read_blocking in another thread, and ps_produce again when it has returned or
 *                   after a ps_request; said once for each read
 *   < PS_WOULD_BLOCK  the negated gRPC status that ends the stream
 * cap below ps_message_max makes shorter messages; one that does not hold a run is an error.
 */
ssize_t ps_produce(void *stream, uint8_t *out, size_t cap);

/*
 * Do the read that ps_produce wants, if any; waits for the disk. Calls beyond the one that is due return at
 * once.
 */
void ps_read_blocking(void *stream);

/* Why the stream ended, for the status message; empty if it did not. */
const char *ps_error(void *stream);

/* The longest message ps_produce makes of enough `cap`. Constant for a stream. */
size_t ps_message_max(void *stream);
/* Ranges not yet fully answered. */
uint32_t ps_outstanding(void *stream);
/* Bytes of memory answered so far, zeros included. */
uint64_t ps_answered(void *stream);

#endif
