/* What the owner does to a stream; calls of a client. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "h2_private.h"

static nghttp2_nv field(const char *name, const char *value) {
    return (nghttp2_nv){(uint8_t *)(uintptr_t)name, (uint8_t *)(uintptr_t)value, strlen(name), strlen(value),
                        NGHTTP2_NV_FLAG_NONE};
}

/* Up to eight digits are allowed: seconds where milliseconds take more. */
static void put_timeout(char *out, size_t cap, int64_t timeout_ms) {
    if (timeout_ms <= 99999999)
        snprintf(out, cap, "%" PRId64 "m", timeout_ms);
    else
        snprintf(out, cap, "%" PRId64 "S", timeout_ms / 1000 > 99999999 ? 99999999 : timeout_ms / 1000);
}

int32_t h2_call(struct h2_conn *conn, const char *path, const char *authority, const char *scheme, int64_t timeout_ms,
                uintptr_t sink, uintptr_t context) {
    if (conn->broken || conn->config.is_server)
        return -1;
    struct h2_stream *stream = h2_stream_new(conn);
    if (!stream)
        return -1;
    char timeout[24];
    nghttp2_nv fields[9] = {
        field(":method", "POST"),
        field(":scheme", scheme),
        field(":path", path),
        field(":authority", authority),
        field("te", "trailers"),
        field("content-type", "application/grpc"),
        field("grpc-accept-encoding", "identity"),
        field("user-agent", "grpc-postcopyd"),
    };
    size_t count = 8;
    if (timeout_ms >= 0) {
        put_timeout(timeout, sizeof timeout, timeout_ms);
        fields[count++] = field("grpc-timeout", timeout);
    }
    stream->route = sink ? H2_TO_SINK : H2_TO_OWNER;
    stream->take = (h2_message_fn)sink;
    stream->context = (void *)context;
    nghttp2_data_provider provider = h2_out_provider(stream);
    stream->id = nghttp2_submit_request(conn->session, NULL, fields, count, &provider, stream);
    if (stream->id < 0) {
        h2_stream_free(stream);
        return -1;
    }
    return stream->id;
}

int h2_send(struct h2_conn *conn, int32_t stream_id, const uint8_t *message, size_t len) {
    struct h2_stream *stream = conn->broken ? NULL : h2_stream_of(conn, stream_id);
    if (!stream || stream->ended || stream->finishing)
        return -1;
    int rc = h2_stream_queue(stream, &stream->outbox, message, len);
    if (rc)
        return rc;
    conn->stats.messages_out++;
    if (conn->config.is_server && !stream->answered && h2_submit_answer(stream))
        return -1;
    h2_stream_wake(stream);
    return 0;
}

int h2_half_close(struct h2_conn *conn, int32_t stream_id) {
    struct h2_stream *stream = conn->broken ? NULL : h2_stream_of(conn, stream_id);
    if (!stream || conn->config.is_server)
        return -1;
    stream->finishing = true;
    h2_stream_wake(stream);
    return 0;
}

int h2_consumed(struct h2_conn *conn, int32_t stream_id, uint32_t len) {
    if (conn->broken)
        return -1;
    /* A stream that has ended needs no window. */
    (void)nghttp2_session_consume_stream(conn->session, stream_id, H2_PREFIX_BYTES + (size_t)len);
    return 0;
}

int h2_reset(struct h2_conn *conn, int32_t stream_id, uint32_t http2_error) {
    struct h2_stream *stream = conn->broken ? NULL : h2_stream_of(conn, stream_id);
    if (!stream)
        return -1;
    stream->ended = true;
    return nghttp2_submit_rst_stream(conn->session, NGHTTP2_FLAG_NONE, stream_id, http2_error);
}
