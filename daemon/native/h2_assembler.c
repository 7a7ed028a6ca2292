#include "h2_assembler.h"

#include <stdlib.h>
#include <string.h>

static uint32_t length_of(const uint8_t *prefix) {
    return (uint32_t)prefix[1] << 24 | (uint32_t)prefix[2] << 16 | (uint32_t)prefix[3] << 8 | prefix[4];
}

void h2_prefix_put(uint8_t *out, size_t len) {
    out[0] = 0;
    out[1] = (uint8_t)(len >> 24);
    out[2] = (uint8_t)(len >> 16);
    out[3] = (uint8_t)(len >> 8);
    out[4] = (uint8_t)len;
}

static enum h2_assembled check_prefix(const uint8_t *prefix, uint32_t max_bytes) {
    if (prefix[0] > 1)
        return H2_BAD_FLAG;
    if (prefix[0])
        return H2_COMPRESSED;
    return length_of(prefix) > max_bytes ? H2_TOO_LARGE : H2_ASSEMBLED;
}

/* Take as much of the prefix as there is; once it is whole, make ready for the message. */
static enum h2_assembled take_prefix(struct h2_assembler *a, const uint8_t **data, size_t *len, uint32_t max_bytes) {
    size_t part = H2_PREFIX_BYTES - a->prefix_len;
    if (part > *len)
        part = *len;
    memcpy(a->prefix + a->prefix_len, *data, part);
    a->prefix_len += (uint8_t)part;
    *data += part;
    *len -= part;
    if (a->prefix_len < H2_PREFIX_BYTES)
        return H2_ASSEMBLED;
    enum h2_assembled rc = check_prefix(a->prefix, max_bytes);
    if (rc == H2_ASSEMBLED) {
        a->need = length_of(a->prefix);
        a->have = 0;
    }
    return rc;
}

/* Copy a part. Memory is taken as the bytes come (doubling), not as the prefix claims. */
static enum h2_assembled take_part(struct h2_assembler *a, const uint8_t *data, size_t part) {
    if (a->have + part > a->cap) {
        size_t want = a->cap ? a->cap : 4096;
        while (want < a->have + part)
            want *= 2;
        if (want > a->need)
            want = a->need;
        uint8_t *grown = realloc(a->message, want);
        if (!grown)
            return H2_NO_MEMORY;
        a->message = grown;
        a->cap = (uint32_t)want;
    }
    memcpy(a->message + a->have, data, part);
    a->have += (uint32_t)part;
    return H2_ASSEMBLED;
}

static void forget(struct h2_assembler *a) {
    free(a->message);
    memset(a, 0, sizeof *a);
}

enum h2_assembled h2_assemble(struct h2_assembler *a, const uint8_t *data, size_t len, uint32_t max_bytes,
                              h2_take_fn take, void *context) {
    while (len || (a->prefix_len == H2_PREFIX_BYTES && a->need == a->have)) {
        enum h2_assembled rc = H2_ASSEMBLED;
        if (a->prefix_len < H2_PREFIX_BYTES) {
            rc = take_prefix(a, &data, &len, max_bytes);
            if (rc != H2_ASSEMBLED)
                return rc;
            continue;
        }
        size_t part = a->need - a->have;
        if (part > len)
            part = len;
        bool in_place = part == a->need;
        if (!in_place)
            rc = take_part(a, data, part);
        if (rc != H2_ASSEMBLED)
            return rc;
        const uint8_t *message = in_place ? data : a->message;
        data += part;
        len -= part;
        if (!in_place && a->have < a->need)
            return H2_ASSEMBLED;
        int stop = take(context, message, a->need);
        forget(a);
        if (stop)
            return H2_STOPPED;
    }
    return H2_ASSEMBLED;
}

bool h2_assembler_is_midway(const struct h2_assembler *a) { return a->prefix_len > 0; }

void h2_assembler_deinit(struct h2_assembler *a) { forget(a); }
