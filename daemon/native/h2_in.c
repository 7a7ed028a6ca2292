/* What arrives: libnghttp2 has checked framing and HTTP semantics, gRPC's rules are checked here. */
#include <stdio.h>
#include <string.h>

#include "h2_private.h"

static const char *why_assembly_failed(enum h2_assembled rc) {
    switch (rc) {
    case H2_TOO_LARGE:
        return "a message is longer than the limit";
    case H2_COMPRESSED:
        return "a message is compressed, which is not supported";
    case H2_BAD_FLAG:
        return "a message's flag byte is neither 0 nor 1";
    default:
        return "no memory for a message";
    }
}

static int status_of_assembly(enum h2_assembled rc) {
    switch (rc) {
    case H2_COMPRESSED:
        return GRPC_UNIMPLEMENTED;
    case H2_BAD_FLAG:
        return GRPC_INTERNAL;
    default:
        return GRPC_RESOURCE_EXHAUSTED;
    }
}

static int push_message(struct h2_stream *stream, const uint8_t *message, size_t len) {
    return h2_push_event(stream->conn, (struct h2_event){.kind = H2_MESSAGE,
                                                         .stream_id = stream->id,
                                                         .len = (uint32_t)len,
                                                         .data = (uint8_t *)(uintptr_t)message});
}

/* A handler's request waits for END_STREAM: before that, the call is not complete. */
static int keep_request(struct h2_stream *stream, const uint8_t *message, size_t len) {
    if (!stream->has_request && h2_stream_queue(stream, &stream->held, message, len) == 0) {
        stream->has_request = true;
        return 0;
    }
    h2_stream_finish(stream, GRPC_UNIMPLEMENTED, "this method takes one request message");
    return -1;
}

static int take_message(void *context, const uint8_t *message, size_t len) {
    struct h2_stream *stream = context;
    stream->conn->stats.messages_in++;
    switch (stream->route) {
    case H2_TO_SINK:
        if (stream->take(stream->context, message, len) >= 0)
            return 0;
        h2_stream_end(stream, H2_BY_SINK, GRPC_INTERNAL, "a reply was refused");
        return -1;
    case H2_TO_OWNER:
        return push_message(stream, message, len);
    case H2_TO_PAGES:
        return h2_pages_request(stream, message, len);
    case H2_TO_HANDLER:
        return keep_request(stream, message, len);
    default:
        return -1;
    }
}

static void fail(struct h2_stream *stream, int status, const char *text) {
    if (stream->conn->config.is_server)
        h2_stream_finish(stream, status, text);
    else
        h2_stream_end(stream, H2_BY_PROTOCOL, status, text);
}

/* In the background, stop where h2_feed_background looks. */
static int pause_after(struct h2_conn *conn, const struct h2_stream *stream, size_t len) {
    if (!conn->in_background)
        return 0;
    conn->piece += len;
    if (conn->piece < conn->config.limits.piece_bytes || h2_assembler_is_midway(&stream->assembler))
        return 0;
    conn->piece = 0;
    return NGHTTP2_ERR_PAUSE;
}

static int on_data_chunk(nghttp2_session *session, uint8_t flags, int32_t stream_id, const uint8_t *data, size_t len,
                         void *user) {
    (void)flags;
    struct h2_conn *conn = user;
    struct h2_stream *stream = nghttp2_session_get_stream_user_data(session, stream_id);
    /* The windows follow consumption: only the owner's own messages wait for anyone (h2_consumed). */
    if (stream && stream->route == H2_TO_OWNER)
        (void)nghttp2_session_consume_connection(session, len);
    else
        (void)nghttp2_session_consume(session, stream_id, len);
    /* A server that has made up its mind does not listen; a client that has sent everything does. */
    if (!stream || stream->ended || (conn->config.is_server && stream->finishing))
        return 0;
    enum h2_assembled rc = h2_assemble(&stream->assembler, data, len, conn->config.limits.max_message_bytes,
                                       take_message, stream);
    if (rc != H2_ASSEMBLED && rc != H2_STOPPED)
        fail(stream, status_of_assembly(rc), why_assembly_failed(rc));
    h2_stream_account(stream);
    h2_stream_wake(stream);
    return conn->broken ? NGHTTP2_ERR_CALLBACK_FAILURE : pause_after(conn, stream, len);
}

/* Client: END_STREAM came. */
static void answer_ended(struct h2_stream *stream) {
    const struct h2_head *head = &stream->head;
    char text[64];
    if (head->grpc_status >= 0) {
        if (head->grpc_status == GRPC_OK && h2_assembler_is_midway(&stream->assembler))
            h2_stream_end(stream, H2_BY_PROTOCOL, GRPC_INTERNAL, "the stream ended within a message");
        else
            h2_stream_end(stream, H2_BY_STATUS, head->grpc_status, head->text);
    } else if (head->http_status != 200) {
        snprintf(text, sizeof text, "HTTP status %d", head->http_status);
        h2_stream_end(stream, H2_BY_STATUS, h2_status_of_http(head->http_status), text);
    } else {
        h2_stream_end(stream, H2_BY_PROTOCOL, GRPC_INTERNAL, "the stream ended without a gRPC status");
    }
}

/* Client: headers that do not end the stream. */
static void answer_began(struct h2_stream *stream) {
    struct h2_head *head = &stream->head;
    char text[64];
    if (head->http_status >= 100 && head->http_status < 200) {
        head->http_status = 0;
    } else if (head->http_status != 200) {
        snprintf(text, sizeof text, "HTTP status %d", head->http_status);
        h2_stream_end(stream, H2_BY_STATUS, h2_status_of_http(head->http_status), text);
    } else if (!head->is_grpc) {
        h2_stream_end(stream, H2_BY_PROTOCOL, GRPC_UNKNOWN, "the answer's content-type is not application/grpc");
    }
}

/* Server: the client sends no more. */
static int requests_ended(struct h2_stream *stream) {
    stream->remote_closed = true;
    if (stream->finishing)
        return 0;
    if (h2_assembler_is_midway(&stream->assembler)) {
        h2_stream_finish(stream, GRPC_INTERNAL, "the stream ended within a message");
    } else if (stream->route == H2_TO_PAGES) {
        h2_stream_wake(stream);
    } else if (!stream->has_request) {
        h2_stream_finish(stream, GRPC_UNIMPLEMENTED, "this method takes one request message");
    } else {
        size_t len = h2_bytes_len(&stream->held) - H2_PREFIX_BYTES;
        int rc = push_message(stream, h2_bytes_front(&stream->held) + H2_PREFIX_BYTES, len);
        h2_bytes_deinit(&stream->held);
        h2_stream_account(stream);
        return rc;
    }
    return 0;
}

static int on_goaway(struct h2_conn *conn, const nghttp2_goaway *goaway) {
    size_t len = goaway->opaque_data_len < H2_TEXT_BYTES ? goaway->opaque_data_len : H2_TEXT_BYTES;
    return h2_push_event(conn, (struct h2_event){.kind = H2_GOAWAY,
                                                 .stream_id = goaway->last_stream_id,
                                                 .status = (int32_t)goaway->error_code,
                                                 .len = (uint32_t)len,
                                                 .data = goaway->opaque_data});
}

static int on_frame(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
    struct h2_conn *conn = user;
    bool is_server = conn->config.is_server;
    bool is_last = frame->hd.flags & NGHTTP2_FLAG_END_STREAM;
    if (frame->hd.type == NGHTTP2_GOAWAY)
        return on_goaway(conn, &frame->goaway) ? NGHTTP2_ERR_CALLBACK_FAILURE : 0;
    struct h2_stream *stream = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
    if (!stream)
        return 0;
    if (frame->hd.type == NGHTTP2_RST_STREAM) {
        stream->reset_by_peer = true;
    } else if (frame->hd.type == NGHTTP2_HEADERS || frame->hd.type == NGHTTP2_DATA) {
        if (is_server && frame->hd.type == NGHTTP2_HEADERS && frame->headers.cat == NGHTTP2_HCAT_REQUEST)
            h2_route_call(stream);
        if (is_last && is_server)
            (void)requests_ended(stream);
        else if (is_last)
            answer_ended(stream);
        else if (!is_server && frame->hd.type == NGHTTP2_HEADERS)
            answer_began(stream);
    }
    return conn->broken ? NGHTTP2_ERR_CALLBACK_FAILURE : 0;
}

static int on_begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
    struct h2_conn *conn = user;
    if (!conn->config.is_server || frame->headers.cat != NGHTTP2_HCAT_REQUEST)
        return 0;
    /* How many there are is bounded by libnghttp2: SETTINGS_MAX_CONCURRENT_STREAMS holds even before it is acknowledged. */
    struct h2_stream *stream = h2_stream_new(conn);
    if (!stream) {
        (void)nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_REFUSED_STREAM);
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    }
    stream->id = frame->hd.stream_id;
    (void)nghttp2_session_set_stream_user_data(session, stream->id, stream);
    return 0;
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_len,
                     const uint8_t *value, size_t value_len, uint8_t flags, void *user) {
    (void)flags;
    struct h2_conn *conn = user;
    struct h2_stream *stream = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
    if (!stream)
        return 0;
    h2_head_take(&stream->head, name, name_len, value, value_len);
    /* HPACK unfolds a few bytes to megabytes: whoever goes far beyond the announced limit loses the connection. */
    if (stream->head.list_bytes / 4 > conn->config.limits.max_header_bytes) {
        h2_break(conn, "a header list is far longer than the limit");
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    }
    return 0;
}

/* The stream is closed on both sides, or was never opened: let it go. */
static int close_stream(struct h2_conn *conn, struct h2_stream *stream, uint32_t error_code) {
    char text[96];
    bool by_peer = stream->reset_by_peer || error_code == NGHTTP2_REFUSED_STREAM;
    snprintf(text, sizeof text, "the stream was reset by %s: %s", by_peer ? "the peer" : "us, as the peer broke HTTP/2",
             nghttp2_http2_strerror(error_code));
    if (!stream->ended) {
        stream->ended = true;
        (void)h2_push_event(conn, (struct h2_event){.kind = H2_ENDED,
                                                    .stream_id = stream->id,
                                                    .status = h2_status_of_reset(error_code),
                                                    .origin = by_peer ? H2_BY_RESET : H2_BY_PROTOCOL,
                                                    .len = (uint32_t)strlen(text),
                                                    .data = (uint8_t *)text});
    }
    h2_stream_free(stream);
    return conn->broken ? NGHTTP2_ERR_CALLBACK_FAILURE : 0;
}

static int on_stream_close(nghttp2_session *session, int32_t stream_id, uint32_t error_code, void *user) {
    struct h2_stream *stream = nghttp2_session_get_stream_user_data(session, stream_id);
    (void)nghttp2_session_set_stream_user_data(session, stream_id, NULL);
    return stream ? close_stream(user, stream, error_code) : 0;
}

/*
 * A call whose HEADERS cannot go out (the peer said GOAWAY, or the call was reset before). libnghttp2 may have opened its
 * stream for that, and then closes it behind this: it must not find what is freed here.
 */
static int on_frame_not_sent(nghttp2_session *session, const nghttp2_frame *frame, int code, void *user) {
    (void)code;
    struct h2_conn *conn = user;
    if (conn->config.is_server || frame->hd.type != NGHTTP2_HEADERS)
        return 0;
    struct h2_stream *stream = h2_stream_of(conn, frame->hd.stream_id);
    (void)nghttp2_session_set_stream_user_data(session, frame->hd.stream_id, NULL);
    return stream ? close_stream(conn, stream, NGHTTP2_REFUSED_STREAM) : 0;
}

/* We end the connection because of what the peer did. */
static void explain_goaway(struct h2_conn *conn, uint32_t error_code) {
    char text[H2_TEXT_BYTES];
    snprintf(text, sizeof text, "the peer broke HTTP/2: %s (%s)", nghttp2_http2_strerror(error_code), conn->hint);
    h2_explain(conn, text);
}

/* A server that answers before the client has finished says so, or the client would go on sending. RFC 9113, 8.1. */
static int on_frame_sent(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
    struct h2_conn *conn = user;
    if (frame->hd.type == NGHTTP2_GOAWAY && frame->goaway.error_code != NGHTTP2_NO_ERROR)
        explain_goaway(conn, frame->goaway.error_code);
    if (!conn->config.is_server || frame->hd.type != NGHTTP2_HEADERS || !(frame->hd.flags & NGHTTP2_FLAG_END_STREAM))
        return 0;
    struct h2_stream *stream = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
    if (stream && !stream->remote_closed)
        (void)nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_NO_ERROR);
    return 0;
}

static int on_library_error(nghttp2_session *session, int code, const char *text, size_t len, void *user) {
    (void)session;
    (void)code;
    (void)len;
    struct h2_conn *conn = user;
    snprintf(conn->hint, sizeof conn->hint, "%s", text);
    return 0;
}

void h2_in_callbacks(nghttp2_session_callbacks *callbacks) {
    nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin_headers);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data_chunk);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_stream_close);
    nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, on_frame_sent);
    nghttp2_session_callbacks_set_on_frame_not_send_callback(callbacks, on_frame_not_sent);
    nghttp2_session_callbacks_set_error_callback2(callbacks, on_library_error);
}
