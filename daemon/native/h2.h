/*
 * One end of a gRPC connection over HTTP/2, without I/O: bytes in (h2_feed), bytes out (h2_fill), events for what
 * the owner must decide (h2_next_event). Framing, HPACK and flow control are libnghttp2's; gRPC's messages, statuses and
 * the limits a hostile peer meets are here.
 *
 * Messages of a page stream go from C to C: received ones to a sink, those to send come from `produce`, which
 * writes at their final place in the output block. No call into the owner is made for a message.
 *
 * Not thread-safe: one thread at a time for a connection. Callbacks must not call h2_feed, h2_fill or h2_free.
 *
 * Sources: RFC 9113; gRPC over HTTP2 (grpc/doc/PROTOCOL-HTTP2.md); nghttp2/nghttp2.h of 1.52.
 */
#ifndef POSTCOPYD_H2_H
#define POSTCOPYD_H2_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct h2_conn;

/* Takes a message whole. Client: 0, or negative to end the stream. Server: 0, or a gRPC status to end the stream. */
typedef int (*h2_message_fn)(void *context, const uint8_t *message, size_t len);

/*
 * Writes the next message and returns its length, at most `cap`; 0: nothing now (asked again after the next request or
 * h2_resume); H2_WOULD_BLOCK: likewise, and the owner is told (H2_STALLED), who has it read and calls h2_resume; less: minus
 * the gRPC status that ends the stream.
 */
typedef ssize_t (*h2_produce_fn)(void *context, uint8_t *out, size_t cap);
typedef const char *(*h2_error_fn)(void *context);

#define H2_WOULD_BLOCK (-1)

/*
 * A new call arrived at a server. The callback routes it with h2_serve_pages or h2_serve_handler and returns 0, or
 * returns the gRPC status to refuse it with. timeout_ms: -1 without a deadline.
 */
typedef int (*h2_open_fn)(void *user, int32_t stream_id, const char *path, int64_t timeout_ms);

struct h2_limits {
    uint32_t max_message_bytes;  /* the longest message received */
    uint32_t max_produced_bytes; /* the most `produce` writes at once */
    uint32_t max_queued_bytes;   /* messages waiting to be sent on a stream */
    uint32_t max_streams;        /* that the peer may have open */
    uint32_t window_bytes;       /* of each stream, and of the connection */
    uint32_t max_frame_bytes;    /* the longest frame received; 16384 to 16777215 */
    uint32_t max_header_bytes;   /* of a header list, counted as RFC 9113 6.5.2 does */
    uint32_t slice_bytes;        /* the most of a block of h2_fill before no further message is begun */
    uint32_t piece_bytes;        /* h2_feed_background looks behind so much */
    uint32_t control_burst;      /* frames that cost more to answer than to send: at once, and a second */
    uint32_t control_rate;
    uint32_t reset_burst; /* RST_STREAM frames: at once, and a second */
    uint32_t reset_rate;
};

struct h2_config {
    int is_server;
    struct h2_limits limits;
    h2_open_fn open; /* server */
    void *user;      /* first argument of open */
};

enum h2_event_kind {
    H2_MESSAGE = 1, /* data, len: a message for the owner; a server's comes once the client has half-closed */
    H2_ENDED = 2,   /* the stream is over: status, origin, and data: the status message */
    H2_STALLED = 3, /* produce would block */
    H2_DRAINED = 4, /* everything queued with h2_send is on its way */
    H2_GOAWAY = 5,  /* status: HTTP/2 error code; data: debug data */
};

/* Who ended a stream. */
enum h2_origin {
    H2_BY_STATUS = 1,   /* the peer, with a gRPC or HTTP status */
    H2_BY_RESET = 2,    /* the peer, with RST_STREAM or GOAWAY */
    H2_BY_PROTOCOL = 3, /* us: the peer broke a rule or a limit */
    H2_BY_SINK = 4,     /* us: the sink refused a message */
    H2_BY_OWNER = 5,    /* us: h2_reset */
};

struct h2_event {
    int32_t kind;
    int32_t stream_id;
    int32_t status;
    int32_t origin;
    uint32_t len;
    uint8_t *data; /* valid until the next call of h2_next_event */
};

enum h2_attention_bit {
    H2_HAS_EVENTS = 1, /* call h2_next_event until it returns 0 */
    H2_HAS_MORE = 2,   /* call h2_fill again */
    H2_IS_OVER = 4,    /* nothing is left to receive or to send: close the connection */
};

struct h2_stats {
    uint64_t messages_in;
    uint64_t messages_out;
    uint64_t bytes_in;
    uint64_t bytes_out;
    uint64_t frames_in_place; /* DATA frames whose messages were produced in the output block */
    uint64_t queued_bytes;    /* in out-queues and half-received messages, now */
    uint64_t queued_peak;
    uint32_t streams;
};

/* NULL: out of memory, or the limits make no sense. */
struct h2_conn *h2_new(const struct h2_config *config);
void h2_free(struct h2_conn *conn);

/*
 * Take received bytes. now_s: any monotonic clock. Returns how many messages they completed; -1: the connection is
 * broken, see h2_error. Call h2_fill after it either way: the peer may have to be told.
 */
int h2_feed(struct h2_conn *conn, const uint8_t *data, size_t len, double now_s);

/* Whether somebody waits for something else than what is being fed. */
typedef bool (*h2_pressing_fn)(intptr_t context);

/*
 * h2_feed of data[begin:end] for what nobody waits for: asks `pressing` at the beginning, if `look_first`, and then behind
 * each frame that ends with a message, once piece_bytes came since the last look, and stops where the answer is yes. Returns
 * where it stopped, which is where the next call begins; -1: the connection is broken. h2_statistics counts the messages.
 */
int64_t h2_feed_background(struct h2_conn *conn, const uint8_t *data, h2_pressing_fn pressing, intptr_t context,
                           size_t begin, size_t end, double now_s, bool look_first);

/*
 * Write what is to be sent; returns its length, 0 if there is nothing, -1 if the connection is broken. The caller
 * calls again while H2_HAS_MORE. cap: at least h2_block_bytes.
 */
ssize_t h2_fill(struct h2_conn *conn, uint8_t *out, size_t cap);
size_t h2_block_bytes(const struct h2_conn *conn);

/*
 * What the owner must do, as bits of enum h2_attention; 0 in most turns, which is why it is one look. Current after h2_feed,
 * h2_fill and h2_next_event.
 */
const uint32_t *h2_attention(const struct h2_conn *conn);

/* Returns 1 and the oldest event, or 0. */
int h2_next_event(struct h2_conn *conn, struct h2_event *event);

/* Why the connection broke, or "". */
const char *h2_error(const struct h2_conn *conn);
const struct h2_stats *h2_statistics(const struct h2_conn *conn);

int h2_ping(struct h2_conn *conn);
/* No new streams; those that are open go on. */
int h2_shutdown(struct h2_conn *conn);

/* Client: begin a call. sink 0: its messages become H2_MESSAGE events. Returns the stream id, or -1. */
int32_t h2_call(struct h2_conn *conn, const char *path, const char *authority, const char *scheme, int64_t timeout_ms,
                uintptr_t sink, uintptr_t context);
/* Both: queue a message. 0; -1: no such stream, or it has ended; -2: the queue is full. */
int h2_send(struct h2_conn *conn, int32_t stream_id, const uint8_t *message, size_t len);
/* Client: no more requests. */
int h2_half_close(struct h2_conn *conn, int32_t stream_id);
/* Client: the owner is done with a received message, so the peer may send more. */
int h2_consumed(struct h2_conn *conn, int32_t stream_id, uint32_t len);
/* Both: RST_STREAM; no further event comes. */
int h2_reset(struct h2_conn *conn, int32_t stream_id, uint32_t http2_error);

/* Server: only within `open`. The functions' addresses, and their first argument. */
int h2_serve_pages(struct h2_conn *conn, int32_t stream_id, uintptr_t context, uintptr_t request, uintptr_t produce,
                   uintptr_t error);
int h2_serve_handler(struct h2_conn *conn, int32_t stream_id);
/* Server: what produce stalled for has been read. */
int h2_resume(struct h2_conn *conn, int32_t stream_id);
/* Server: end the call once what is queued is sent. */
int h2_finish(struct h2_conn *conn, int32_t stream_id, int status, const char *message);

#endif
