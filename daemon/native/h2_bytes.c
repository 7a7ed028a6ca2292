#include "h2_bytes.h"

#include <stdlib.h>
#include <string.h>

enum { LEAST_CAP = 512, KEEP_CAP = 64 << 10 };

void h2_bytes_deinit(struct h2_bytes *bytes) {
    free(bytes->data);
    memset(bytes, 0, sizeof *bytes);
}

size_t h2_bytes_len(const struct h2_bytes *bytes) { return bytes->end - bytes->start; }

uint8_t *h2_bytes_reserve(struct h2_bytes *bytes, size_t len) {
    size_t queued = h2_bytes_len(bytes);
    if (bytes->cap - bytes->end >= len && bytes->data)
        return bytes->data + bytes->end;
    size_t need = queued + len;
    if (need > bytes->cap) {
        size_t cap = bytes->cap ? bytes->cap : LEAST_CAP;
        while (cap < need)
            cap *= 2;
        uint8_t *data = malloc(cap);
        if (!data)
            return NULL;
        if (queued)
            memcpy(data, bytes->data + bytes->start, queued);
        free(bytes->data);
        bytes->data = data;
        bytes->cap = cap;
    } else {
        memmove(bytes->data, bytes->data + bytes->start, queued);
    }
    bytes->start = 0;
    bytes->end = queued;
    return bytes->data + queued;
}

void h2_bytes_commit(struct h2_bytes *bytes, size_t len) { bytes->end += len; }

const uint8_t *h2_bytes_front(const struct h2_bytes *bytes) { return bytes->data + bytes->start; }

void h2_bytes_drop(struct h2_bytes *bytes, size_t len) {
    bytes->start += len;
    if (bytes->start < bytes->end)
        return;
    bytes->start = bytes->end = 0;
    /* A burst is over: give its memory back, so idle streams cost little. */
    if (bytes->cap > KEEP_CAP) {
        free(bytes->data);
        bytes->data = NULL;
        bytes->cap = 0;
    }
}
