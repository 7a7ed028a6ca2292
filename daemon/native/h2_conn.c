/* A connection's life. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "h2_private.h"

void h2_explain(struct h2_conn *conn, const char *why) {
    if (!conn->error[0])
        snprintf(conn->error, sizeof conn->error, "%s", why);
}

int h2_break(struct h2_conn *conn, const char *why) {
    h2_explain(conn, why);
    conn->broken = true;
    return -1;
}

static bool limits_make_sense(const struct h2_limits *limits) {
    /* A message that waits for the owner whole must fit in the window, or both ends wait for ever. */
    uint64_t longest = (uint64_t)limits->max_message_bytes + H2_PREFIX_BYTES;
    return limits->window_bytes >= 2 * longest && limits->window_bytes <= NGHTTP2_MAX_WINDOW_SIZE &&
           limits->max_frame_bytes >= 16384 && limits->max_frame_bytes <= 16777215 && limits->max_streams > 0 &&
           limits->slice_bytes > 0 && limits->piece_bytes > 0 && limits->max_queued_bytes >= limits->max_message_bytes &&
           limits->max_produced_bytes <= 1u << 30;
}

static int make_session(struct h2_conn *conn) {
    nghttp2_session_callbacks *callbacks = NULL;
    nghttp2_option *option = NULL;
    int rc = NGHTTP2_ERR_NOMEM;
    if (nghttp2_session_callbacks_new(&callbacks) == 0 && nghttp2_option_new(&option) == 0) {
        h2_in_callbacks(callbacks);
        h2_out_callbacks(callbacks);
        nghttp2_option_set_no_auto_window_update(option, 1);
        /* Closed streams are kept for RFC 7540's priorities only, which nobody uses. */
        nghttp2_option_set_no_closed_streams(option, 1);
        rc = conn->config.is_server ? nghttp2_session_server_new2(&conn->session, callbacks, conn, option)
                                    : nghttp2_session_client_new2(&conn->session, callbacks, conn, option);
    }
    nghttp2_option_del(option);
    nghttp2_session_callbacks_del(callbacks);
    return rc;
}

static int greet(struct h2_conn *conn) {
    const struct h2_limits *limits = &conn->config.limits;
    nghttp2_settings_entry settings[] = {
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, limits->window_bytes},
        {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, limits->max_frame_bytes},
        {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, limits->max_header_bytes},
        {NGHTTP2_SETTINGS_NO_RFC7540_PRIORITIES, 1},
        /* The last differs by role. A client's limit would be for pushed streams, which are off. */
        {NGHTTP2_SETTINGS_ENABLE_PUSH, 0},
    };
    size_t count = sizeof settings / sizeof *settings;
    if (conn->config.is_server)
        settings[count - 1] = (nghttp2_settings_entry){NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, limits->max_streams};
    int rc = nghttp2_submit_settings(conn->session, NGHTTP2_FLAG_NONE, settings, count);
    if (rc)
        return rc;
    return nghttp2_session_set_local_window_size(conn->session, NGHTTP2_FLAG_NONE, 0, (int32_t)limits->window_bytes);
}

struct h2_conn *h2_new(const struct h2_config *config) {
    if (!limits_make_sense(&config->limits) || (config->is_server && !config->open))
        return NULL;
    struct h2_conn *conn = calloc(1, sizeof *conn);
    if (!conn)
        return NULL;
    conn->config = *config;
    conn->slice = h2_first_slice(conn);
    const struct h2_limits *limits = &config->limits;
    h2_guard_init(&conn->guard, config->is_server,
                  (struct h2_bucket){.burst = limits->control_burst, .rate = limits->control_rate},
                  (struct h2_bucket){.burst = limits->reset_burst, .rate = limits->reset_rate});
    if (make_session(conn) || greet(conn)) {
        h2_free(conn);
        return NULL;
    }
    return conn;
}

void h2_free(struct h2_conn *conn) {
    if (!conn)
        return;
    nghttp2_session_del(conn->session);
    while (conn->streams)
        h2_stream_free(conn->streams);
    h2_events_deinit(&conn->events);
    free(conn);
}

/* What libnghttp2 says of its input: -1 if that broke the connection. */
static ssize_t receive(struct h2_conn *conn, const uint8_t *data, size_t len) {
    ssize_t n = nghttp2_session_mem_recv(conn->session, data, len);
    if (n < 0)
        return h2_break(conn, n == NGHTTP2_ERR_BAD_CLIENT_MAGIC ? "the peer does not speak HTTP/2"
                                                                : nghttp2_strerror((int)n));
    return conn->broken ? -1 : n;
}

/* Have the guard judge what it has not seen, as a part may come again. */
static int judge(struct h2_conn *conn, const uint8_t *data, size_t len, double now_s) {
    const char *flood = h2_guard_feed(&conn->guard, data + conn->judged, len - conn->judged, (uint64_t)(now_s * 1000));
    conn->judged = len;
    if (!flood)
        return 0;
    char text[64];
    snprintf(text, sizeof text, "the peer floods with frames: %s", flood);
    h2_explain(conn, text);
    conn->over = true;
    int rc = nghttp2_session_terminate_session(conn->session, NGHTTP2_ENHANCE_YOUR_CALM);
    return rc ? h2_break(conn, nghttp2_strerror(rc)) : 0;
}

/* Take bytes up to the next look, in the background, or all. How many were taken, or -1. */
static ssize_t take_bytes(struct h2_conn *conn, const uint8_t *data, size_t len, double now_s) {
    if (conn->broken || (!conn->over && judge(conn, data, len, now_s)))
        return -1;
    ssize_t n = (ssize_t)len;
    if (!conn->over) {
        n = receive(conn, data, len);
        if (n < 0)
            return -1;
        conn->judged = len - (size_t)n;
        /* A pause at the end of a frame leaves undone what follows from that end. */
        if (conn->in_background && !conn->judged && receive(conn, data + len, 0) < 0)
            return -1;
    }
    conn->stats.bytes_in += (uint64_t)n;
    return n;
}

int h2_feed(struct h2_conn *conn, const uint8_t *data, size_t len, double now_s) {
    uint64_t before = conn->stats.messages_in;
    ssize_t n = take_bytes(conn, data, len, now_s);
    h2_update_attention(conn);
    return n < 0 ? -1 : (int)(conn->stats.messages_in - before);
}

int64_t h2_feed_background(struct h2_conn *conn, const uint8_t *data, h2_pressing_fn pressing, intptr_t context,
                           size_t begin, size_t end, double now_s, bool look_first) {
    bool look = look_first;
    conn->in_background = true;
    while (begin < end && !(look && pressing(context))) {
        ssize_t n = take_bytes(conn, data + begin, end - begin, now_s);
        if (n < 0)
            break;
        begin += (size_t)n;
        look = true;
    }
    conn->in_background = false;
    h2_update_attention(conn);
    return conn->broken ? -1 : (int64_t)begin;
}

void h2_update_attention(struct h2_conn *conn) {
    bool wants_write = !conn->broken && nghttp2_session_want_write(conn->session);
    bool is_over = conn->broken || (!wants_write && !nghttp2_session_want_read(conn->session));
    conn->attention =
        (conn->events.count ? H2_HAS_EVENTS : 0) | (wants_write ? H2_HAS_MORE : 0) | (is_over ? H2_IS_OVER : 0);
}

const uint32_t *h2_attention(const struct h2_conn *conn) { return &conn->attention; }

const char *h2_error(const struct h2_conn *conn) { return conn->error; }

const struct h2_stats *h2_statistics(const struct h2_conn *conn) { return &conn->stats; }

int h2_ping(struct h2_conn *conn) {
    return conn->broken ? -1 : nghttp2_submit_ping(conn->session, NGHTTP2_FLAG_NONE, NULL);
}

int h2_shutdown(struct h2_conn *conn) {
    if (conn->broken)
        return -1;
    int32_t last = nghttp2_session_get_last_proc_stream_id(conn->session);
    return nghttp2_submit_goaway(conn->session, NGHTTP2_FLAG_NONE, last, NGHTTP2_NO_ERROR, NULL, 0);
}
