#include "h2_guard.h"

#include <string.h>

#include <nghttp2/nghttp2.h>

static void refill(struct h2_bucket *bucket, uint64_t elapsed_ms) {
    uint64_t full = (uint64_t)bucket->burst * 1000;
    /* An hour refills any bucket; the bound keeps the product from overflowing. */
    if (elapsed_ms > 3600000)
        elapsed_ms = 3600000;
    bucket->tokens_milli += elapsed_ms * bucket->rate;
    if (bucket->tokens_milli > full)
        bucket->tokens_milli = full;
}

static bool take(struct h2_bucket *bucket) {
    if (bucket->tokens_milli < 1000)
        return false;
    bucket->tokens_milli -= 1000;
    return true;
}

void h2_guard_init(struct h2_guard *guard, bool is_server, struct h2_bucket control, struct h2_bucket resets) {
    memset(guard, 0, sizeof *guard);
    guard->skip = is_server ? NGHTTP2_CLIENT_MAGIC_LEN : 0;
    guard->control = control;
    guard->resets = resets;
    guard->control.tokens_milli = (uint64_t)control.burst * 1000;
    guard->resets.tokens_milli = (uint64_t)resets.burst * 1000;
}

/* The name of the flood that this frame completes, or NULL. */
static const char *judge(struct h2_guard *guard) {
    const uint8_t *h = guard->header;
    uint32_t len = (uint32_t)h[0] << 16 | (uint32_t)h[1] << 8 | h[2];
    uint8_t flags = h[4];
    guard->skip = len;
    switch (h[3]) {
    case NGHTTP2_HEADERS:
        guard->continuations = 0;
        return NULL;
    case NGHTTP2_CONTINUATION:
        return ++guard->continuations > H2_MAX_CONTINUATIONS ? "CONTINUATION" : NULL;
    case NGHTTP2_RST_STREAM:
        return take(&guard->resets) ? NULL : "RST_STREAM";
    case NGHTTP2_WINDOW_UPDATE:
        /* Costs as much to send as to take, and large transfers need many. */
        return NULL;
    case NGHTTP2_DATA:
        if (len > 0 || flags & NGHTTP2_FLAG_END_STREAM)
            return NULL;
        return take(&guard->control) ? NULL : "empty DATA";
    case NGHTTP2_SETTINGS:
    case NGHTTP2_PING:
        if (flags & NGHTTP2_FLAG_ACK)
            return NULL;
        return take(&guard->control) ? NULL : "PING or SETTINGS";
    default:
        return take(&guard->control) ? NULL : "PRIORITY or unknown";
    }
}

const char *h2_guard_feed(struct h2_guard *guard, const uint8_t *data, size_t len, uint64_t now_ms) {
    if (guard->started && now_ms > guard->last_ms) {
        refill(&guard->control, now_ms - guard->last_ms);
        refill(&guard->resets, now_ms - guard->last_ms);
    }
    guard->started = true;
    guard->last_ms = now_ms;
    while (len) {
        size_t part = guard->skip;
        if (!part)
            part = H2_FRAME_HEADER_BYTES - guard->header_len;
        if (part > len)
            part = len;
        if (guard->skip) {
            guard->skip -= (uint32_t)part;
        } else {
            memcpy(guard->header + guard->header_len, data, part);
            guard->header_len += (uint8_t)part;
        }
        data += part;
        len -= part;
        if (guard->header_len == H2_FRAME_HEADER_BYTES) {
            guard->header_len = 0;
            const char *flood = judge(guard);
            if (flood)
                return flood;
        }
    }
    return NULL;
}
