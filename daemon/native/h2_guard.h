/*
 * Watches the frames that arrive, before libnghttp2 sees them, for floods that cost the sender little: PING, SETTINGS,
 * PRIORITY, empty DATA, RST_STREAM (rapid reset, CVE-2023-44487) and CONTINUATION (CVE-2024-28182). Independent
 * of what the installed libnghttp2 knows of them: 1.52 as released has neither limit, distributions patched some in.
 */
#ifndef POSTCOPYD_H2_GUARD_H
#define POSTCOPYD_H2_GUARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { H2_FRAME_HEADER_BYTES = 9, H2_MAX_CONTINUATIONS = 8 };

/* A token bucket in thousandths, so that a rate below one a millisecond adds up. */
struct h2_bucket {
    uint64_t tokens_milli;
    uint32_t burst;
    uint32_t rate; /* tokens a second */
};

struct h2_guard {
    uint32_t skip; /* payload or preface bytes to pass over */
    uint8_t header[H2_FRAME_HEADER_BYTES];
    uint8_t header_len;
    uint8_t continuations; /* in the header block at hand */
    uint64_t last_ms;
    bool started;
    struct h2_bucket control;
    struct h2_bucket resets;
};

void h2_guard_init(struct h2_guard *guard, bool is_server, struct h2_bucket control, struct h2_bucket resets);
/* NULL, or the name of what the peer floods us with. */
const char *h2_guard_feed(struct h2_guard *guard, const uint8_t *data, size_t len, uint64_t now_ms);

#endif
