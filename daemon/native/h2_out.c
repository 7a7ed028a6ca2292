/*
 * DATA on the way out. libnghttp2 asks, in this order and without anything between, for the length it may send
 * (plan_frame), for the payload (read_payload) and to have the frame written (write_frame). All work is done in the first
 * step: it alone knows the flow-control windows before the length is fixed. A message is produced at its final place
 * in the block when the windows and the peer's frame size take the largest there can be; otherwise it goes through
 * the stream's outbox, from where it leaves in the pieces the peer allows.
 */
#include <string.h>

#include "h2_private.h"

/*
 * One frame gathers small messages up to this: libnghttp2 allocates for more than its default of 16 KiB, and a frame costs
 * about a microsecond.
 */
enum { GATHER_BYTES = 16 << 10, CONTROL_FRAME_BYTES = 32 << 10 };

/* The first block after a rest is short: the peer works on it while the next is made. Then each may be twice the last. */
enum { FIRST_SLICE_BYTES = 32 << 10 };

/* What is zero takes long to find and few bytes to tell: so many messages and no more, as others wait meanwhile. */
enum { BLOCK_MESSAGES_MAX = 16 };

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

size_t h2_first_slice(const struct h2_conn *conn) { return least(FIRST_SLICE_BYTES, conn->config.limits.slice_bytes); }

size_t h2_out_reserve(const struct h2_conn *conn) {
    return H2_FRAME_HEADER_BYTES + H2_PREFIX_BYTES + conn->config.limits.max_produced_bytes + CONTROL_FRAME_BYTES;
}

/* Nothing more is begun in this block. */
static bool is_full(const struct h2_conn *conn) {
    return conn->block_used >= conn->slice || conn->block_messages >= BLOCK_MESSAGES_MAX ||
           conn->block_cap - conn->block_used < h2_out_reserve(conn);
}

/* Produce messages behind the place where the frame's header will be. */
static void produce_in_place(struct h2_stream *stream, size_t allowed) {
    struct h2_conn *conn = stream->conn;
    size_t need = H2_PREFIX_BYTES + (size_t)conn->config.limits.max_produced_bytes;
    uint8_t *payload = conn->block + conn->block_used + H2_FRAME_HEADER_BYTES;
    size_t room = least(allowed, conn->block_cap - conn->block_used - H2_FRAME_HEADER_BYTES);
    size_t len = 0;
    while (len < GATHER_BYTES && room - len >= need && conn->block_messages < BLOCK_MESSAGES_MAX) {
        uint8_t *at = payload + len;
        ssize_t n = h2_pages_produce(stream, at + H2_PREFIX_BYTES, need - H2_PREFIX_BYTES);
        if (n <= 0)
            break;
        h2_prefix_put(at, (size_t)n);
        len += H2_PREFIX_BYTES + (size_t)n;
        conn->block_messages++;
    }
    stream->planned = len;
    stream->in_place = len > 0;
}

static void produce_to_outbox(struct h2_stream *stream) {
    size_t cap = stream->conn->config.limits.max_produced_bytes;
    uint8_t *at = h2_bytes_reserve(&stream->outbox, H2_PREFIX_BYTES + cap);
    if (!at) {
        h2_stream_finish(stream, GRPC_RESOURCE_EXHAUSTED, "the page server is out of memory");
        return;
    }
    ssize_t n = h2_pages_produce(stream, at + H2_PREFIX_BYTES, cap);
    if (n <= 0)
        return;
    h2_prefix_put(at, (size_t)n);
    h2_bytes_commit(&stream->outbox, H2_PREFIX_BYTES + (size_t)n);
    stream->conn->block_messages++;
    h2_stream_account(stream);
}

static ssize_t plan_frame(nghttp2_session *session, uint8_t type, int32_t stream_id, int32_t session_window,
                          int32_t stream_window, uint32_t max_frame, void *user) {
    (void)type;
    (void)user;
    struct h2_stream *stream = nghttp2_session_get_stream_user_data(session, stream_id);
    if (!stream || session_window <= 0 || stream_window <= 0)
        return 1;
    size_t allowed = least(max_frame, least((size_t)session_window, (size_t)stream_window));
    struct h2_conn *conn = stream->conn;
    stream->planned = 0;
    stream->in_place = false;
    if (stream->produce && !h2_bytes_len(&stream->outbox)) {
        if (allowed >= H2_PREFIX_BYTES + (size_t)conn->config.limits.max_produced_bytes)
            produce_in_place(stream, allowed);
        else
            produce_to_outbox(stream);
    }
    if (!stream->in_place) {
        size_t room = conn->block_cap - conn->block_used - H2_FRAME_HEADER_BYTES;
        stream->planned = least(h2_bytes_len(&stream->outbox), least(allowed, room));
    }
    /* 0 would be an error to libnghttp2; read_payload says that there is nothing. */
    return stream->planned ? (ssize_t)stream->planned : 1;
}

static ssize_t read_payload(nghttp2_session *session, int32_t stream_id, uint8_t *buf, size_t length, uint32_t *flags,
                            nghttp2_data_source *source, void *user) {
    (void)session;
    (void)stream_id;
    (void)buf;
    (void)user;
    struct h2_stream *stream = source->ptr;
    bool is_last = stream->finishing && (stream->in_place || stream->planned == h2_bytes_len(&stream->outbox));
    if (!stream->planned && !is_last) {
        stream->deferred = true;
        return NGHTTP2_ERR_DEFERRED;
    }
    if (stream->planned > length)
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    if (stream->planned)
        *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    if (is_last) {
        *flags |= NGHTTP2_DATA_FLAG_EOF;
        if (stream->conn->config.is_server) {
            *flags |= NGHTTP2_DATA_FLAG_NO_END_STREAM;
            if (h2_submit_status(stream))
                return NGHTTP2_ERR_CALLBACK_FAILURE;
        }
    }
    return (ssize_t)stream->planned;
}

static void copy_from_outbox(struct h2_stream *stream, uint8_t *payload, size_t len) {
    memcpy(payload, h2_bytes_front(&stream->outbox), len);
    h2_bytes_drop(&stream->outbox, len);
    h2_stream_account(stream);
    if (stream->route == H2_TO_HANDLER && !h2_bytes_len(&stream->outbox))
        (void)h2_push_event(stream->conn, (struct h2_event){.kind = H2_DRAINED, .stream_id = stream->id});
}

static int write_frame(nghttp2_session *session, nghttp2_frame *frame, const uint8_t *header, size_t length,
                       nghttp2_data_source *source, void *user) {
    (void)session;
    (void)frame;
    struct h2_conn *conn = user;
    struct h2_stream *stream = source->ptr;
    uint8_t *at = conn->block + conn->block_used;
    memcpy(at, header, H2_FRAME_HEADER_BYTES);
    if (stream->in_place)
        conn->stats.frames_in_place++;
    else
        copy_from_outbox(stream, at + H2_FRAME_HEADER_BYTES, length);
    conn->block_used += H2_FRAME_HEADER_BYTES + length;
    if (conn->broken)
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    return is_full(conn) ? NGHTTP2_ERR_PAUSE : 0;
}

nghttp2_data_provider h2_out_provider(struct h2_stream *stream) {
    return (nghttp2_data_provider){.source = {.ptr = stream}, .read_callback = read_payload};
}

void h2_out_callbacks(nghttp2_session_callbacks *callbacks) {
    nghttp2_session_callbacks_set_data_source_read_length_callback(callbacks, plan_frame);
    nghttp2_session_callbacks_set_send_data_callback(callbacks, write_frame);
}

static ssize_t fill_block(struct h2_conn *conn, uint8_t *out, size_t cap) {
    if (conn->broken)
        return -1;
    if (cap < h2_out_reserve(conn))
        return h2_break(conn, "the output block is too small");
    conn->block = out;
    conn->block_cap = cap;
    conn->block_used = 0;
    conn->block_messages = 0;
    while (!is_full(conn)) {
        const uint8_t *data;
        ssize_t n = nghttp2_session_mem_send(conn->session, &data);
        if (n < 0)
            return h2_break(conn, nghttp2_strerror((int)n));
        if (n == 0)
            break;
        if ((size_t)n > cap - conn->block_used)
            return h2_break(conn, "a control frame is longer than expected");
        memcpy(out + conn->block_used, data, (size_t)n);
        conn->block_used += (size_t)n;
    }
    conn->stats.bytes_out += conn->block_used;
    conn->slice = conn->block_used < conn->slice ? h2_first_slice(conn)
                                                 : least(2 * conn->slice, conn->config.limits.slice_bytes);
    return (ssize_t)conn->block_used;
}

ssize_t h2_fill(struct h2_conn *conn, uint8_t *out, size_t cap) {
    ssize_t rc = fill_block(conn, out, cap);
    h2_update_attention(conn);
    return rc;
}

size_t h2_block_bytes(const struct h2_conn *conn) { return conn->config.limits.slice_bytes + h2_out_reserve(conn); }
