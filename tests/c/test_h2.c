// sources: h2_assembler.c h2_bytes.c h2_call.c h2_conn.c h2_events.c h2_guard.c h2_head.c h2_in.c h2_out.c h2_pages.c h2_server.c h2_stream.c
// libs: -lnghttp2
/* A client and a server joined in memory: cut at every byte, in every window, against the double of doubles/. */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../daemon/native/h2.h"
#include "../../daemon/native/h2_assembler.h"
#include "../../daemon/native/h2_guard.h"
#include "../../daemon/native/h2_head.h"
#include "../doubles/h2_double.c"

#define PATH "/postcopyd.v1.PageSource/Pages"

struct server {
    struct h2_conn *conn;
    struct page_double *page;
    char path[128];
    int64_t timeout_ms;
};

struct wire {
    uint8_t *data;
    size_t len;
};

static int open_call(void *user, int32_t stream_id, const char *path, int64_t timeout_ms) {
    struct server *server = user;
    snprintf(server->path, sizeof server->path, "%s", path);
    server->timeout_ms = timeout_ms;
    if (strcmp(path, PATH) != 0)
        return h2_serve_handler(server->conn, stream_id);
    return h2_serve_pages(server->conn, stream_id, (uintptr_t)server->page, (uintptr_t)double_request,
                          (uintptr_t)double_produce, (uintptr_t)double_error);
}

static struct h2_limits limits(uint32_t window, uint32_t frame) {
    return (struct h2_limits){.max_message_bytes = 8 << 10,
                              .max_produced_bytes = 32 << 10,
                              .max_queued_bytes = 64 << 10,
                              .max_streams = 8,
                              .window_bytes = window,
                              .max_frame_bytes = frame,
                              .max_header_bytes = 16 << 10,
                              .slice_bytes = 32 << 10,
                              .piece_bytes = 4 << 10,
                              .control_burst = 1000,
                              .control_rate = 10,
                              .reset_burst = 100,
                              .reset_rate = 10};
}

static struct h2_conn *new_client(uint32_t window, uint32_t frame) {
    struct h2_config config = {.limits = limits(window, frame)};
    return h2_new(&config);
}

static void new_server(struct server *server) {
    struct h2_config config = {.is_server = 1, .limits = limits(64 << 10, 16384), .open = open_call, .user = server};
    memset(server, 0, sizeof *server);
    server->page = double_new();
    server->conn = h2_new(&config);
    assert(server->conn && server->page);
}

static void free_server(struct server *server) {
    h2_free(server->conn);
    double_free(server->page);
}

/* All that `conn` has to send now. Exact memory, so that AddressSanitizer sees a step beyond it. */
static struct wire take(struct h2_conn *conn) {
    struct wire wire = {NULL, 0};
    size_t cap = h2_block_bytes(conn);
    uint8_t *block = malloc(cap);
    ssize_t n;
    while ((n = h2_fill(conn, block, cap)) > 0) {
        wire.data = realloc(wire.data, wire.len + (size_t)n);
        memcpy(wire.data + wire.len, block, (size_t)n);
        wire.len += (size_t)n;
    }
    free(block);
    return wire;
}

static int feed_exact(struct h2_conn *conn, const uint8_t *data, size_t len) {
    uint8_t *copy = malloc(len ? len : 1);
    memcpy(copy, data, len);
    int rc = h2_feed(conn, copy, len, 0);
    free(copy);
    return rc;
}

/* Move bytes both ways until nobody has any, `step` at a time. */
static void pump(struct h2_conn *a, struct h2_conn *b, size_t step) {
    for (int idle = 0; idle < 2;) {
        struct wire wire = take(a);
        idle = wire.len ? 0 : idle + 1;
        for (size_t at = 0; at < wire.len; at += step)
            assert(feed_exact(b, wire.data + at, wire.len - at < step ? wire.len - at : step) >= 0);
        free(wire.data);
        struct h2_conn *other = a;
        a = b;
        b = other;
    }
}

static int32_t call(struct h2_conn *client, struct reply_double *reply) {
    return h2_call(client, PATH, "x", "http", 5000, (uintptr_t)double_reply, (uintptr_t)reply);
}

static void send_range(struct h2_conn *client, int32_t id, uint32_t count, uint32_t length, uint32_t mode, uint32_t arg) {
    uint32_t range[4] = {count, length, mode, arg};
    assert(h2_send(client, id, (const uint8_t *)range, sizeof range) == 0);
}

static struct h2_event next(struct h2_conn *conn) {
    struct h2_event event = {0};
    (void)h2_next_event(conn, &event);
    return event;
}

static void replies_arrive_whole_in_steps_of(size_t step, uint32_t window, uint32_t frame) {
    struct server server;
    struct reply_double reply = {0};
    struct h2_conn *client = new_client(window, frame);
    new_server(&server);
    int32_t id = call(client, &reply);
    send_range(client, id, 3, 8, DOUBLE_ANSWER, 0);
    send_range(client, id, 2, 5000, DOUBLE_ANSWER, 0);
    send_range(client, id, 9, 8 << 10, DOUBLE_ANSWER, 0);
    assert(h2_half_close(client, id) == 0);
    pump(client, server.conn, step);
    assert(reply.messages == 14 && reply.wrong == 0 && reply.bytes == 24 + 10000 + 9 * (8 << 10));
    struct h2_event end = next(client);
    assert(end.kind == H2_ENDED && end.status == 0 && end.origin == H2_BY_STATUS && end.len == 0);
    assert(strcmp(server.path, PATH) == 0 && server.timeout_ms == 5000);
    assert(next(server.conn).kind == H2_ENDED);
    assert(h2_statistics(client)->streams == 0 && h2_statistics(server.conn)->queued_bytes == 0);
    assert((h2_statistics(server.conn)->frames_in_place > 0) == (frame > 16384));
    h2_free(client);
    free_server(&server);
}

/* The same bytes, cut into two at every position: nothing depends on where the network cuts. */
static void every_cut_of_an_answer_gives_the_same(void) {
    struct server server;
    struct reply_double reply = {0};
    struct h2_conn *client = new_client(1 << 20, 1 << 20);
    new_server(&server);
    int32_t id = call(client, &reply);
    send_range(client, id, 3, 300, DOUBLE_ANSWER, 0);
    send_range(client, id, 1, 8, DOUBLE_FAIL, 5);
    struct wire up = take(client);
    assert(feed_exact(server.conn, up.data, up.len) >= 0);
    struct wire down = take(server.conn);
    h2_free(client);
    free_server(&server);
    for (size_t cut = 0; cut <= down.len; cut++) {
        struct reply_double again = {0};
        client = new_client(1 << 20, 1 << 20);
        id = call(client, &again);
        free(take(client).data);
        assert(feed_exact(client, down.data, cut) >= 0);
        assert(feed_exact(client, down.data + cut, down.len - cut) >= 0);
        struct h2_event end = next(client);
        assert(again.messages == 3 && again.wrong == 0);
        assert(end.kind == H2_ENDED && end.status == 5 && end.len == strlen(double_error(NULL)));
        assert(memcmp(end.data, double_error(NULL), end.len) == 0);
        h2_free(client);
    }
    for (size_t cut = 0; cut <= up.len; cut++) {
        new_server(&server);
        assert(feed_exact(server.conn, up.data, cut) >= 0);
        assert(feed_exact(server.conn, up.data + cut, up.len - cut) >= 0);
        assert(server.page->requests == 2);
        struct wire same = take(server.conn);
        assert(same.len == down.len);
        free(same.data);
        free_server(&server);
    }
    free(up.data);
    free(down.data);
}

/* Who waits: asks[n] is the answer to look n. */
struct waiting {
    const char *asks;
    unsigned looks;
};

static bool is_pressing(intptr_t context) {
    struct waiting *waiting = (struct waiting *)context;
    char answer = waiting->asks[waiting->looks];
    waiting->looks += answer != 0;
    return answer == 'y';
}

/* One call of a client, and all that a server answered to `ranges` of 8 KiB. */
static struct wire answers(struct h2_conn **client, struct reply_double *reply, uint32_t ranges) {
    struct server server;
    *client = new_client(1 << 20, 1 << 20);
    new_server(&server);
    int32_t id = call(*client, reply);
    send_range(*client, id, ranges, 8 << 10, DOUBLE_ANSWER, 0);
    struct wire up = take(*client);
    assert(feed_exact(server.conn, up.data, up.len) >= 0);
    free(up.data);
    struct wire down = take(server.conn);
    free_server(&server);
    return down;
}

/* A frame gathers two messages, and a piece is less than one: a look behind every second message. */
static void the_background_gives_way_behind_messages(void) {
    struct reply_double reply = {0};
    struct h2_conn *client;
    struct wire down = answers(&client, &reply, 40);
    struct waiting nobody = {.asks = ""}, somebody = {.asks = "nynynyyyy"};
    int64_t at = h2_feed_background(client, down.data, is_pressing, (intptr_t)&somebody, 0, down.len, 0, true);
    for (int stops = 0; stops < 3; stops++) {
        assert(at > 0 && (size_t)at < down.len && reply.messages > 0 && reply.messages % 2 == 0 && reply.messages < 40);
        uint64_t before = reply.messages;
        int64_t same = h2_feed_background(client, down.data, is_pressing, (intptr_t)&(struct waiting){"y", 0}, (size_t)at,
                                          down.len, 0, true);
        assert(same == at && reply.messages == before);
        at = h2_feed_background(client, down.data, is_pressing, (intptr_t)&somebody, (size_t)at, down.len, 0, false);
    }
    at = h2_feed_background(client, down.data, is_pressing, (intptr_t)&nobody, (size_t)at, down.len, 0, true);
    assert((size_t)at == down.len && reply.messages == 40 && reply.wrong == 0);
    assert(h2_statistics(client)->messages_in == 40 && h2_statistics(client)->bytes_in == down.len);
    free(down.data);
    h2_free(client);
}

/* The stream ends with the very frame behind which the background would look. */
static void an_end_behind_the_last_look_is_told(void) {
    struct reply_double reply = {0};
    struct h2_conn *client;
    struct wire down = answers(&client, &reply, 3);
    size_t last = 0;
    for (size_t at = 0; at < down.len; at += 9u + ((size_t)down.data[at] << 16 | (size_t)down.data[at + 1] << 8 | down.data[at + 2]))
        last = at;
    assert(down.data[last + 3] == 0 /* DATA */);
    down.data[last + 4] |= 1; /* END_STREAM */
    struct waiting nobody = {.asks = ""};
    int64_t at = h2_feed_background(client, down.data, is_pressing, (intptr_t)&nobody, 0, down.len, 0, true);
    assert((size_t)at == down.len && reply.messages == 3 && next(client).kind == H2_ENDED);
    free(down.data);
    h2_free(client);
}

/* What comes again because the background gave way is no second flood. */
static void what_gave_way_is_judged_once(void) {
    enum { PINGS = 600, PING = 9 + 8 };
    struct reply_double reply = {0};
    struct h2_conn *client;
    struct wire down = answers(&client, &reply, 9);
    down.data = realloc(down.data, down.len + PINGS * PING);
    for (int i = 0; i < PINGS; i++, down.len += PING)
        memcpy(down.data + down.len, (const uint8_t[PING]){0, 0, 8, 6}, PING);
    struct waiting somebody = {.asks = "yyy"};
    int64_t at = 0;
    while (at >= 0 && (size_t)at < down.len)
        at = h2_feed_background(client, down.data, is_pressing, (intptr_t)&somebody, (size_t)at, down.len, 0, false);
    assert(somebody.looks == 3 && (size_t)at == down.len && !h2_error(client)[0] && reply.messages == 9);
    free(down.data);
    h2_free(client);
}

/* Sizes of the blocks that `count` messages of `len` bytes leave in. */
static size_t blocks_of(uint32_t count, uint32_t len, size_t *sizes, size_t max) {
    struct server server;
    struct h2_config config = {.is_server = 1, .limits = limits(64 << 10, 16384), .open = open_call, .user = &server};
    struct reply_double reply = {0};
    struct h2_conn *client = new_client(1 << 20, 1 << 20);
    memset(&server, 0, sizeof server);
    config.limits.slice_bytes = 128 << 10;
    server.page = double_new();
    server.conn = h2_new(&config);
    int32_t id = call(client, &reply);
    pump(client, server.conn, 1 << 20);
    size_t found = 0;
    for (int again = 0; again < 2; again++) {
        send_range(client, id, count, len, DOUBLE_ANSWER, 0);
        struct wire up = take(client);
        assert(feed_exact(server.conn, up.data, up.len) >= 0);
        free(up.data);
        uint8_t *block = malloc(h2_block_bytes(server.conn));
        ssize_t n;
        while ((n = h2_fill(server.conn, block, h2_block_bytes(server.conn))) > 0) {
            assert(found < max);
            sizes[found++] = (size_t)n;
            assert(feed_exact(client, block, (size_t)n) >= 0);
        }
        free(block);
    }
    assert(reply.messages == 2 * count && reply.wrong == 0);
    h2_free(client);
    free_server(&server);
    return found;
}

static void a_rest_makes_the_next_block_short(void) {
    size_t sizes[16];
    /* 8 KiB each: 32 KiB, 64 KiB, 128 KiB, and the last 16 KiB; from the beginning again. */
    size_t blocks = blocks_of(30, 8 << 10, sizes, 16);
    assert(blocks == 8);
    for (size_t i = 0; i < blocks; i++) {
        static const size_t wanted[] = {32 << 10, 64 << 10, 128 << 10, 16 << 10};
        assert(sizes[i] >= wanted[i % 4] && sizes[i] < wanted[i % 4] + (1 << 10));
    }
}

static void what_is_long_to_find_is_told_in_between(void) {
    size_t sizes[16];
    size_t blocks = blocks_of(40, 8, sizes, 16);
    assert(blocks == 6 && sizes[0] > 16 * 8 && sizes[0] < 17 * 16 && sizes[2] < sizes[1]);
}

static void a_stalled_stream_takes_requests_and_goes_on(void) {
    struct server server;
    struct reply_double reply = {0};
    struct h2_conn *client = new_client(1 << 20, 1 << 20);
    new_server(&server);
    int32_t id = call(client, &reply);
    send_range(client, id, 2, 100, DOUBLE_STALL, 0);
    pump(client, server.conn, 1000);
    assert(next(server.conn).kind == H2_STALLED && reply.messages == 0);
    send_range(client, id, 1, 100, DOUBLE_ANSWER, 0);
    assert(h2_half_close(client, id) == 0);
    pump(client, server.conn, 1000);
    /* Half-closed and nothing to produce, yet not over: a read is under way. */
    assert(server.page->requests == 2 && next(client).kind == 0);
    double_read(server.page);
    assert(h2_resume(server.conn, id) == 0);
    pump(client, server.conn, 1000);
    assert(reply.messages == 3 && next(client).status == 0);
    h2_free(client);
    free_server(&server);
}

static void a_handler_gets_the_request_and_its_replies_arrive(void) {
    struct server server;
    struct h2_conn *client = new_client(1 << 20, 1 << 20);
    new_server(&server);
    int32_t id = h2_call(client, "/a/B", "x", "http", -1, 0, 0);
    assert(h2_send(client, id, (const uint8_t *)"ask", 3) == 0);
    pump(client, server.conn, 7);
    assert(next(server.conn).kind == 0);
    assert(h2_half_close(client, id) == 0);
    pump(client, server.conn, 7);
    struct h2_event event = next(server.conn);
    assert(event.kind == H2_MESSAGE && event.len == 3 && memcmp(event.data, "ask", 3) == 0 && server.timeout_ms == -1);
    assert(h2_send(server.conn, id, (const uint8_t *)"answer", 6) == 0);
    assert(h2_send(server.conn, id, NULL, 0) == 0);
    assert(h2_finish(server.conn, id, 0, "") == 0);
    pump(client, server.conn, 7);
    event = next(client);
    assert(event.kind == H2_MESSAGE && event.len == 6);
    event = next(client);
    assert(event.kind == H2_MESSAGE && event.len == 0);
    assert(next(client).kind == H2_ENDED);
    h2_free(client);
    free_server(&server);
}

static void a_queue_that_is_full_says_so(void) {
    static const uint8_t message[8 << 10];
    struct h2_conn *client = new_client(1 << 20, 1 << 20);
    int32_t id = h2_call(client, PATH, "x", "http", -1, 0, 0);
    int sent = 0;
    int rc;
    while ((rc = h2_send(client, id, message, sizeof message)) == 0)
        sent++;
    assert(rc == -2 && sent == 7);
    assert(h2_send(client, id + 2, message, 1) == -1);
    h2_free(client);
}

static void limits_that_would_hang_are_refused(void) {
    struct h2_config config = {.limits = limits(8 << 10, 16384)};
    assert(!h2_new(&config));
    config.limits = limits(1 << 20, 1000);
    assert(!h2_new(&config));
    config = (struct h2_config){.is_server = 1, .limits = limits(1 << 20, 16384)};
    assert(!h2_new(&config));
}

static void timeouts_parse(void) {
    static const struct {
        const char *text;
        int64_t ms;
    } cases[] = {{"5S", 5000}, {"250m", 250},         {"1n", 1},       {"1000001n", 2}, {"99999999H", 359999996400000},
                 {"3M", 180000}, {"", -1},            {"S", -1},       {"5", -1},       {"5s", -1},
                 {"-5S", -1},    {"123456789S", -1}, {"1 S", -1},     {"0m", 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert(h2_timeout_parse((const uint8_t *)cases[i].text, strlen(cases[i].text)) == cases[i].ms);
}

static void texts_survive_percent_encoding(void) {
    static const char text[] = "100 % of \xe2\x82\xac\n~";
    char coded[64], plain[64];
    size_t len = h2_percent_encode(text, coded, sizeof coded);
    assert(len == strlen("100 %25 of %E2%82%AC%0A~") && !memcmp(coded, "100 %25 of %E2%82%AC%0A~", len));
    h2_percent_decode((const uint8_t *)coded, len, plain, sizeof plain);
    assert(strcmp(plain, "100 % of \xe2\x82\xac ~") == 0);
    h2_percent_decode((const uint8_t *)"%4", 2, plain, sizeof plain);
    assert(strcmp(plain, "%4") == 0);
    h2_percent_decode((const uint8_t *)"abcdef", 6, plain, 4);
    assert(strcmp(plain, "abc") == 0);
}

static void buckets_refill_with_time(void) {
    static const uint8_t ping[9 + 8] = {0, 0, 8, 6};
    struct h2_guard guard;
    struct h2_bucket control = {.burst = 3, .rate = 2}, resets = {.burst = 1, .rate = 1};
    h2_guard_init(&guard, false, control, resets);
    for (int i = 0; i < 3; i++)
        assert(!h2_guard_feed(&guard, ping, sizeof ping, 1000));
    /* Half a second gives one, across a cut in the frame's header. */
    assert(!h2_guard_feed(&guard, ping, 5, 1500));
    assert(!h2_guard_feed(&guard, ping + 5, sizeof ping - 5, 1500));
    assert(h2_guard_feed(&guard, ping, sizeof ping, 1501));
}

int main(void) {
    static const size_t steps[] = {1, 2, 3, 5, 9, 13, 64, 1000, 16384, 1 << 20};
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        replies_arrive_whole_in_steps_of(steps[i], 1 << 20, 1 << 20);
        replies_arrive_whole_in_steps_of(steps[i], 17 << 10, 16384);
    }
    every_cut_of_an_answer_gives_the_same();
    the_background_gives_way_behind_messages();
    an_end_behind_the_last_look_is_told();
    what_gave_way_is_judged_once();
    a_rest_makes_the_next_block_short();
    what_is_long_to_find_is_told_in_between();
    a_stalled_stream_takes_requests_and_goes_on();
    a_handler_gets_the_request_and_its_replies_arrive();
    a_queue_that_is_full_says_so();
    limits_that_would_hang_are_refused();
    timeouts_parse();
    texts_survive_percent_encoding();
    buckets_refill_with_time();
    return 0;
}
