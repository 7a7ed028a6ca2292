/*
 * libFuzzer target: arbitrary bytes to a server (FUZZ_SERVER=1) or to a client with an open call (0).
 *
 * The first byte says in what steps the rest arrives, and whether somebody waits now and then, so that it is taken in pieces. A server gets the connection preface and SETTINGS first, so that the
 * input's frames are reached; a client's call is sent before. After each step everything is taken out, as the owner does.
 */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "../../daemon/native/h2.h"
#include "../doubles/h2_double.c"

struct end {
    struct h2_conn *conn;
    struct page_double *page;
    struct reply_double reply;
    uint8_t *block;
    int32_t call;
};

static int open_call(void *user, int32_t stream_id, const char *path, int64_t timeout_ms) {
    struct end *end = user;
    (void)timeout_ms;
    if (strstr(path, "Pages"))
        return h2_serve_pages(end->conn, stream_id, (uintptr_t)end->page, (uintptr_t)double_request,
                              (uintptr_t)double_produce, (uintptr_t)double_error);
    return path[1] == 'x' ? 12 : h2_serve_handler(end->conn, stream_id);
}

static void begin(struct end *end) {
    struct h2_config config = {.is_server = FUZZ_SERVER,
                               .open = open_call,
                               .user = end,
                               .limits = {.max_message_bytes = 4096,
                                          .max_produced_bytes = 4096,
                                          .max_queued_bytes = 16384,
                                          .max_streams = 4,
                                          .window_bytes = 65535,
                                          .max_frame_bytes = 16384,
                                          .max_header_bytes = 4096,
                                          .slice_bytes = 8192,
                                          .piece_bytes = 256,
                                          .control_burst = 50,
                                          .control_rate = 10,
                                          .reset_burst = 20,
                                          .reset_rate = 10}};
    static const uint32_t range[4] = {3, 100, DOUBLE_ANSWER, 0};
    end->page = double_new();
    end->conn = h2_new(&config);
    if (!end->conn || !end->page)
        abort();
    end->block = malloc(h2_block_bytes(end->conn));
    if (FUZZ_SERVER) {
        static const uint8_t hello[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0";
        h2_feed(end->conn, hello, sizeof hello, 0);
        return;
    }
    end->call = h2_call(end->conn, "/a/Pages", "x", "http", 1000, (uintptr_t)double_reply, (uintptr_t)&end->reply);
    h2_send(end->conn, end->call, (const uint8_t *)range, sizeof range);
    h2_call(end->conn, "/a/B", "x", "http", -1, 0, 0);
}

/* What an owner does with events: a server answers handlers and reads what stalls, a client consumes. */
static void decide(struct end *end) {
    struct h2_event event;
    while (h2_next_event(end->conn, &event)) {
        if (event.kind == H2_STALLED) {
            double_read(end->page);
            h2_resume(end->conn, event.stream_id);
        } else if (event.kind == H2_MESSAGE && FUZZ_SERVER) {
            h2_send(end->conn, event.stream_id, event.data, event.len);
            h2_finish(end->conn, event.stream_id, event.len ? event.data[0] & 15 : 0, "why not");
        } else if (event.kind == H2_MESSAGE) {
            h2_consumed(end->conn, event.stream_id, event.len);
        }
    }
}

static void take_out(struct end *end) {
    /* The double answers without end if asked to; a few blocks show whatever there is to see. */
    for (int blocks = 0; blocks < 4; blocks++) {
        if (h2_fill(end->conn, end->block, h2_block_bytes(end->conn)) <= 0)
            break;
        decide(end);
    }
}

static bool every_third_time(intptr_t context) {
    unsigned *asked = (unsigned *)context;
    return ++*asked % 3 == 0;
}

static int feed(struct end *end, const uint8_t *data, size_t len, double now_s, bool in_background) {
    if (!in_background)
        return h2_feed(end->conn, data, len, now_s);
    unsigned asked = 0;
    for (int64_t at = 0; at < (int64_t)len;) {
        int64_t to = h2_feed_background(end->conn, data, every_third_time, (intptr_t)&asked, (size_t)at, len, now_s, false);
        if (to <= at && to >= 0)
            abort();
        if (to < 0)
            return -1;
        at = to;
    }
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    struct end end;
    memset(&end, 0, sizeof end);
    begin(&end);
    take_out(&end);
    size_t step = len ? data[0] + 1u : 1;
    if (step > 200)
        step = 1 << 20;
    for (size_t at = 1; at < len; at += step) {
        size_t part = len - at < step ? len - at : step;
        uint8_t *copy = malloc(part);
        memcpy(copy, data + at, part);
        int rc = feed(&end, copy, part, (double)at / 1000, data[0] & 1);
        free(copy);
        decide(&end);
        take_out(&end);
        if (rc < 0 || *h2_attention(end.conn) & H2_IS_OVER)
            break;
        if (h2_statistics(end.conn)->queued_bytes > 4 * (16384 + 2 * 4101 + 4096 + 16384))
            abort();
    }
    h2_free(end.conn);
    double_free(end.page);
    free(end.block);
    return 0;
}
