/* A server's page stream: requests go to C, replies come from C. */
#include "h2_private.h"

/* The page stream's own words, if it has any. */
static void fail(struct h2_stream *stream, int status) {
    const char *text = stream->error(stream->context);
    h2_stream_finish(stream, status, text ? text : "");
}

int h2_pages_request(struct h2_stream *stream, const uint8_t *message, size_t len) {
    int status = stream->take(stream->context, message, len);
    if (status)
        fail(stream, status > 0 && status <= GRPC_UNAUTHENTICATED ? status : GRPC_INTERNAL);
    return status;
}

ssize_t h2_pages_produce(struct h2_stream *stream, uint8_t *out, size_t cap) {
    if (stream->finishing)
        return 0;
    ssize_t n = stream->produce(stream->context, out, cap);
    if (n > 0 && (size_t)n <= cap) {
        stream->conn->stats.messages_out++;
        return n;
    }
    if (n == H2_WOULD_BLOCK) {
        stream->stalled = true;
        (void)h2_push_event(stream->conn, (struct h2_event){.kind = H2_STALLED, .stream_id = stream->id});
    } else if (n == 0) {
        /* While a read is under way, nothing now is not nothing more. */
        if (stream->remote_closed && !stream->stalled)
            h2_stream_finish(stream, GRPC_OK, "");
    } else {
        fail(stream, n >= -GRPC_UNAUTHENTICATED && n < 0 ? (int)-n : GRPC_INTERNAL);
    }
    return 0;
}

int h2_resume(struct h2_conn *conn, int32_t stream_id) {
    struct h2_stream *stream = h2_stream_of(conn, stream_id);
    if (!stream || !stream->stalled)
        return -1;
    stream->stalled = false;
    h2_stream_wake(stream);
    return 0;
}

int h2_serve_pages(struct h2_conn *conn, int32_t stream_id, uintptr_t context, uintptr_t request, uintptr_t produce,
                   uintptr_t error) {
    struct h2_stream *stream = h2_stream_of(conn, stream_id);
    if (!stream || stream->route != H2_UNROUTED || !conn->config.is_server || !request || !produce || !error)
        return -1;
    stream->route = H2_TO_PAGES;
    stream->context = (void *)context;
    stream->take = (h2_message_fn)request;
    stream->produce = (h2_produce_fn)produce;
    stream->error = (h2_error_fn)error;
    return 0;
}
