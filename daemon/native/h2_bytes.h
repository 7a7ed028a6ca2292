/* A queue of bytes: appended at the end, taken from the front. Bounded by its user. */
#ifndef POSTCOPYD_H2_BYTES_H
#define POSTCOPYD_H2_BYTES_H

#include <stddef.h>
#include <stdint.h>

struct h2_bytes {
    uint8_t *data;
    size_t start; /* of what is queued */
    size_t end;
    size_t cap;
};

void h2_bytes_deinit(struct h2_bytes *bytes);
size_t h2_bytes_len(const struct h2_bytes *bytes);
/* Room for `len` more bytes, or NULL without memory. What is written there counts after h2_bytes_commit. */
uint8_t *h2_bytes_reserve(struct h2_bytes *bytes, size_t len);
void h2_bytes_commit(struct h2_bytes *bytes, size_t len);
const uint8_t *h2_bytes_front(const struct h2_bytes *bytes);
void h2_bytes_drop(struct h2_bytes *bytes, size_t len);

#endif
