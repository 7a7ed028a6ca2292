/* What a server answers: headers, trailers, refusals. */
#include <stdio.h>
#include <string.h>

#include "h2_private.h"

static nghttp2_nv field(const char *name, const char *value, size_t value_len) {
    return (nghttp2_nv){(uint8_t *)(uintptr_t)name, (uint8_t *)(uintptr_t)value, strlen(name), value_len,
                        NGHTTP2_NV_FLAG_NONE};
}

static nghttp2_nv text_field(const char *name, const char *value) { return field(name, value, strlen(value)); }

int h2_submit_answer(struct h2_stream *stream) {
    nghttp2_nv fields[] = {
        text_field(":status", "200"),
        text_field("content-type", "application/grpc"),
        text_field("grpc-accept-encoding", "identity"),
    };
    nghttp2_data_provider provider = h2_out_provider(stream);
    stream->answered = true;
    return nghttp2_submit_response(stream->conn->session, stream->id, fields, sizeof fields / sizeof *fields,
                                   &provider);
}

/* The trailers; or, when nothing was answered yet, a response that is only trailers. */
int h2_submit_status(struct h2_stream *stream) {
    char status[8];
    char message[3 * H2_TEXT_BYTES];
    nghttp2_nv fields[5] = {
        text_field(":status", "200"),
        text_field("content-type", "application/grpc"),
        text_field("grpc-accept-encoding", "identity"),
    };
    size_t first = stream->answered ? 3 : 0;
    size_t count = 3;
    snprintf(status, sizeof status, "%d", stream->status);
    fields[count++] = text_field("grpc-status", status);
    if (stream->text[0])
        fields[count++] = field("grpc-message", message, h2_percent_encode(stream->text, message, sizeof message));
    nghttp2_session *session = stream->conn->session;
    if (stream->answered)
        return nghttp2_submit_trailer(session, stream->id, fields + first, count - first);
    stream->answered = true;
    return nghttp2_submit_response(session, stream->id, fields, count, NULL);
}

/* Not gRPC: answered in plain HTTP. Source: PROTOCOL-HTTP2.md, "Requests". */
static void refuse_http(struct h2_stream *stream, const char *http_status) {
    nghttp2_nv fields[] = {text_field(":status", http_status)};
    stream->finishing = true;
    stream->answered = true;
    (void)nghttp2_submit_response(stream->conn->session, stream->id, fields, 1, NULL);
}

void h2_route_call(struct h2_stream *stream) {
    const struct h2_head *head = &stream->head;
    const struct h2_config *config = &stream->conn->config;
    if (head->list_bytes > config->limits.max_header_bytes) {
        h2_stream_finish(stream, GRPC_RESOURCE_EXHAUSTED, "the header list is longer than the limit");
    } else if (!head->is_post) {
        refuse_http(stream, "405");
    } else if (!head->is_grpc) {
        refuse_http(stream, "415");
    } else if (head->is_compressed) {
        h2_stream_finish(stream, GRPC_UNIMPLEMENTED, "compression is not supported");
    } else if (head->bad_timeout) {
        h2_stream_finish(stream, GRPC_INTERNAL, "grpc-timeout is malformed");
    } else {
        int status = config->open(config->user, stream->id, head->path, head->timeout_ms);
        if (status == 0 && stream->route == H2_UNROUTED)
            status = GRPC_INTERNAL;
        if (status)
            h2_stream_finish(stream, status, status == GRPC_UNIMPLEMENTED ? "no such method" : "refused");
        else if (stream->route == H2_TO_PAGES)
            (void)h2_submit_answer(stream);
    }
}

int h2_serve_handler(struct h2_conn *conn, int32_t stream_id) {
    struct h2_stream *stream = h2_stream_of(conn, stream_id);
    if (!stream || stream->route != H2_UNROUTED || !conn->config.is_server)
        return -1;
    stream->route = H2_TO_HANDLER;
    return 0;
}

int h2_finish(struct h2_conn *conn, int32_t stream_id, int status, const char *message) {
    struct h2_stream *stream = conn->broken ? NULL : h2_stream_of(conn, stream_id);
    if (!stream || stream->finishing)
        return -1;
    /* What is queued may never leave if the client does not read: past the deadline it does not wait. */
    if (status == GRPC_DEADLINE_EXCEEDED && h2_bytes_len(&stream->outbox))
        return nghttp2_submit_rst_stream(conn->session, NGHTTP2_FLAG_NONE, stream_id, NGHTTP2_CANCEL);
    h2_stream_finish(stream, status, message);
    return 0;
}
