/* What the h2_*.c files share. Not for others: see h2.h. */
#ifndef POSTCOPYD_H2_PRIVATE_H
#define POSTCOPYD_H2_PRIVATE_H

#include <stdbool.h>

#include <nghttp2/nghttp2.h>

#include "h2.h"
#include "h2_assembler.h"
#include "h2_bytes.h"
#include "h2_guard.h"
#include "h2_head.h"

/* Where a stream's messages go. */
enum h2_route {
    H2_UNROUTED = 0,
    H2_TO_SINK,    /* client: the C sink */
    H2_TO_OWNER,   /* client: events */
    H2_TO_PAGES,   /* server: request, produce */
    H2_TO_HANDLER, /* server: events */
};

struct h2_stream {
    struct h2_conn *conn;
    struct h2_stream *next;
    int32_t id;
    enum h2_route route;
    struct h2_head head;
    struct h2_assembler assembler;
    struct h2_bytes outbox; /* prefixed messages to send */
    struct h2_bytes held;   /* handler: its request, until END_STREAM */
    h2_message_fn take;
    h2_produce_fn produce;
    h2_error_fn error;
    void *context;
    size_t planned;     /* payload of the DATA frame at hand */
    bool in_place;      /* it lies in the block already */
    bool deferred;      /* libnghttp2 waits for nghttp2_session_resume_data */
    bool stalled;       /* between H2_STALLED and h2_resume */
    bool has_request;   /* handler: a request is here */
    bool remote_closed; /* the peer sent END_STREAM */
    bool answered;      /* server: response headers are submitted */
    bool finishing;     /* send what is queued, then end our side */
    bool ended;         /* nothing more goes to the owner */
    bool reset_by_peer;
    int status;               /* server: for the trailers */
    char text[H2_TEXT_BYTES]; /* likewise */
    uint64_t accounted;       /* our part of stats.queued_bytes */
};

struct h2_events {
    struct h2_event *items;
    size_t first;
    size_t count;
    size_t cap;
    uint8_t *given; /* data of the event that was taken last */
};

struct h2_conn {
    nghttp2_session *session;
    struct h2_config config;
    struct h2_guard guard;
    struct h2_events events;
    struct h2_stream *streams;
    struct h2_stats stats;
    uint32_t attention;
    uint8_t *block; /* h2_fill's, while it runs */
    size_t block_cap;
    size_t block_used;
    unsigned block_messages; /* page streams' */
    size_t slice;            /* h2_fill begins no further message beyond this */
    size_t piece;            /* h2_feed_background: DATA taken since the last look */
    size_t judged;           /* bytes behind those taken that the guard has seen already */
    bool in_background;
    bool broken;
    bool over; /* told the peer to go: nothing is read any more */
    char error[H2_TEXT_BYTES];
    char hint[H2_TEXT_BYTES / 2]; /* what libnghttp2 complained of last; it may have been of no consequence */
};

/* h2_events.c. -1: too many, or no memory; the connection is broken then. */
int h2_push_event(struct h2_conn *conn, struct h2_event event);
void h2_events_deinit(struct h2_events *events);

/* h2_conn.c */
void h2_update_attention(struct h2_conn *conn);
/* The first reason stays. Returns -1. */
int h2_break(struct h2_conn *conn, const char *why);
/* Note why the connection is about to end, unless a reason is known. */
void h2_explain(struct h2_conn *conn, const char *why);

/* h2_stream.c */
struct h2_stream *h2_stream_new(struct h2_conn *conn);
void h2_stream_free(struct h2_stream *stream);
struct h2_stream *h2_stream_of(const struct h2_conn *conn, int32_t stream_id);
/* Have libnghttp2 ask for DATA again. */
void h2_stream_wake(struct h2_stream *stream);
void h2_stream_account(struct h2_stream *stream);
/* Queue a message with its prefix. -2: full or no memory. */
int h2_stream_queue(struct h2_stream *stream, struct h2_bytes *queue, const uint8_t *message, size_t len);
/* Client: tell the owner that the stream is over, and the peer if it does not know. */
void h2_stream_end(struct h2_stream *stream, enum h2_origin origin, int status, const char *text);
/* Server: the trailers follow what is queued. The first status stays. */
void h2_stream_finish(struct h2_stream *stream, int status, const char *text);

/* h2_pages.c: a page stream's requests and replies. */
int h2_pages_request(struct h2_stream *stream, const uint8_t *message, size_t len);
/* Length written, or <= 0 when there is nothing; what follows from that is noted in the stream. */
ssize_t h2_pages_produce(struct h2_stream *stream, uint8_t *out, size_t cap);

/* h2_in.c, h2_out.c: install the callbacks. */
void h2_in_callbacks(nghttp2_session_callbacks *callbacks);
void h2_out_callbacks(nghttp2_session_callbacks *callbacks);
nghttp2_data_provider h2_out_provider(struct h2_stream *stream);
/* What the first block after a rest may hold. */
size_t h2_first_slice(const struct h2_conn *conn);
/* What a frame may need at most: h2_fill stops when less is left. */
size_t h2_out_reserve(const struct h2_conn *conn);

/* h2_server.c */
void h2_route_call(struct h2_stream *stream);
int h2_submit_answer(struct h2_stream *stream);
int h2_submit_status(struct h2_stream *stream);

#endif
