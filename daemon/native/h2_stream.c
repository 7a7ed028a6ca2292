/* A stream's life, and its queues. */
#include <stdlib.h>
#include <string.h>

#include "h2_private.h"

struct h2_stream *h2_stream_new(struct h2_conn *conn) {
    struct h2_stream *stream = calloc(1, sizeof *stream);
    if (!stream)
        return NULL;
    stream->conn = conn;
    h2_head_init(&stream->head);
    stream->next = conn->streams;
    conn->streams = stream;
    conn->stats.streams++;
    return stream;
}

void h2_stream_free(struct h2_stream *stream) {
    struct h2_conn *conn = stream->conn;
    struct h2_stream **link = &conn->streams;
    while (*link != stream)
        link = &(*link)->next;
    *link = stream->next;
    conn->stats.streams--;
    h2_assembler_deinit(&stream->assembler);
    h2_bytes_deinit(&stream->outbox);
    h2_bytes_deinit(&stream->held);
    h2_stream_account(stream);
    free(stream);
}

struct h2_stream *h2_stream_of(const struct h2_conn *conn, int32_t stream_id) {
    /* Not libnghttp2's look-up: that knows a call only once its HEADERS are sent. Streams are few. */
    struct h2_stream *stream = conn->streams;
    while (stream && stream->id != stream_id)
        stream = stream->next;
    return stream;
}

void h2_stream_wake(struct h2_stream *stream) {
    if (!stream->deferred)
        return;
    stream->deferred = false;
    /* Fails only for a stream that is closing, which needs no data. */
    (void)nghttp2_session_resume_data(stream->conn->session, stream->id);
}

void h2_stream_account(struct h2_stream *stream) {
    struct h2_stats *stats = &stream->conn->stats;
    uint64_t now = h2_bytes_len(&stream->outbox) + h2_bytes_len(&stream->held) + stream->assembler.cap;
    stats->queued_bytes += now - stream->accounted;
    stream->accounted = now;
    if (stats->queued_bytes > stats->queued_peak)
        stats->queued_peak = stats->queued_bytes;
}

int h2_stream_queue(struct h2_stream *stream, struct h2_bytes *queue, const uint8_t *message, size_t len) {
    size_t max = stream->conn->config.limits.max_queued_bytes;
    if (len > max || h2_bytes_len(queue) + H2_PREFIX_BYTES + len > max)
        return -2;
    uint8_t *at = h2_bytes_reserve(queue, H2_PREFIX_BYTES + len);
    if (!at)
        return -2;
    h2_prefix_put(at, len);
    if (len)
        memcpy(at + H2_PREFIX_BYTES, message, len);
    h2_bytes_commit(queue, H2_PREFIX_BYTES + len);
    h2_stream_account(stream);
    return 0;
}

void h2_stream_end(struct h2_stream *stream, enum h2_origin origin, int status, const char *text) {
    if (stream->ended)
        return;
    stream->ended = true;
    (void)h2_push_event(stream->conn, (struct h2_event){.kind = H2_ENDED,
                                                        .stream_id = stream->id,
                                                        .status = status,
                                                        .origin = (int32_t)origin,
                                                        .len = (uint32_t)strlen(text),
                                                        .data = (uint8_t *)(uintptr_t)text});
    nghttp2_session *session = stream->conn->session;
    if (nghttp2_session_get_stream_local_close(session, stream->id) == 0)
        (void)nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, stream->id, NGHTTP2_CANCEL);
}

void h2_stream_finish(struct h2_stream *stream, int status, const char *text) {
    if (stream->finishing)
        return;
    stream->finishing = true;
    stream->status = status;
    size_t len = strnlen(text, sizeof stream->text - 1);
    memcpy(stream->text, text, len);
    stream->text[len] = 0;
    if (!stream->answered)
        (void)h2_submit_status(stream);
    else
        h2_stream_wake(stream);
}
