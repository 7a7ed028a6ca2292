// sources: server_wire.c
#include "server_wire.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* open {image_id "vm", epoch 0x0807060504030201, run_align 4096, max_data_bytes 65536}, ranges {7, 8192, 4096, 1} */
static const uint8_t REQUEST[] = {
    0x0a, 0x14, 0x0a, 0x02, 'v',  'm',  0x11, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x18,
    0x80, 0x20, 0x20, 0x80, 0x80, 0x04, 0x12, 0x0a, 0x08, 0x07, 0x10, 0x80, 0x40, 0x18, 0x80, 0x20,
    0x20, 0x01,
};

/* A copy of exactly its length, so that the sanitizer sees any byte read beyond it. */
static uint8_t *exact_copy(const uint8_t *message, size_t len)
{
    uint8_t *copy = malloc(len ? len : 1);

    memcpy(copy, message, len);
    return copy;
}

static int parse(const uint8_t *message, size_t len)
{
    uint8_t *copy = exact_copy(message, len);
    struct wire_reader reader = { .at = copy, .end = copy + len };
    struct wire_open open;
    struct wire_range range;
    int outcome = request_open(copy, len, &open);

    if (outcome >= 0)
        while ((outcome = request_next_range(&reader, &range)) > 0)
            ;
    free(copy);
    return outcome;
}

static void a_request_is_read(void)
{
    struct wire_reader reader = { .at = REQUEST, .end = REQUEST + sizeof REQUEST };
    struct wire_open open;
    struct wire_range range;

    assert(request_open(REQUEST, sizeof REQUEST, &open) == 1);
    assert(open.image_id_len == 2 && memcmp(open.image_id, "vm", 2) == 0);
    assert(open.epoch == 0x0807060504030201);
    assert(open.run_align == 4096 && open.max_data_bytes == 65536);
    assert(request_next_range(&reader, &range) == 1);
    assert(range.request_id == 7 && range.offset == 8192 && range.length == 4096 && range.priority == 1);
    assert(request_next_range(&reader, &range) == 0);
}

static void every_truncation_is_malformed_or_lacks_the_range(void)
{
    for (size_t len = 1; len < sizeof REQUEST; len++)
        assert(parse(REQUEST, len) == (len == 22 ? 0 : -1));
}

static void every_changed_byte_stays_within_bounds(void)
{
    for (size_t at = 0; at < sizeof REQUEST; at++)
        for (unsigned value = 0; value < 256; value++) {
            uint8_t *message = exact_copy(REQUEST, sizeof REQUEST);
            message[at] = (uint8_t)value;
            parse(message, sizeof REQUEST);
            free(message);
        }
}

#define REFUSED(...)                                              \
    do {                                                          \
        const uint8_t message[] = { __VA_ARGS__ };                \
        assert(parse(message, sizeof message) == -1);             \
    } while (0)

static void malformed_requests_are_refused(void)
{
    /* Field number 0; a varint of eleven bytes; one beyond 64 bits; groups; wire types 6 and 7. */
    REFUSED(0x00, 0x00);
    REFUSED(0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01);
    REFUSED(0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02);
    REFUSED(0x1b, 0x1c);
    REFUSED(0x1e);
    REFUSED(0x1f);
    /* A length beyond the end, one beyond the sub-message, and one that would wrap a pointer. */
    REFUSED(0x12, 0x05, 0x08, 0x01);
    REFUSED(0x0a, 0x02, 0x0a, 0x09);
    REFUSED(0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01);
}

static void unknown_fields_are_skipped(void)
{
    /* Numbers 3 (varint), 4 (fixed64), 5 (bytes), 6 (fixed32), 1 as a varint, then a range with an unknown 9. */
    static const uint8_t message[] = {
        0x18, 0x2a, 0x21, 1, 2, 3, 4, 5, 6, 7, 8, 0x2a, 0x01, 0xff, 0x35, 1, 2, 3, 4,
        0x08, 0x01, 0x12, 0x05, 0x48, 0x01, 0x10, 0x80, 0x20,
    };
    struct wire_reader reader = { .at = message, .end = message + sizeof message };
    struct wire_open open;
    struct wire_range range;

    assert(request_open(message, sizeof message, &open) == 0);
    assert(request_next_range(&reader, &range) == 1);
    assert(range.offset == 4096 && range.length == 0);
}

/* What page_stream.c builds upon: sizes known before lengths are, and zero headers that fit where data headers would. */
static void header_sizes(void)
{
    static const uint64_t values[] = { 0, 127, 128, 4096, 1ull << 34, UINT64_MAX - 4095 };
    uint8_t out[RUN_HEADER_MAX];

    for (unsigned i = 0; i < 6; i++)
        for (unsigned j = 0; j < 6; j++) {
            size_t size = reply_data_header_size(values[i], values[j]);
            assert(size <= RUN_HEADER_MAX);
            assert(reply_put_data_header(out, values[i], values[j], 4096, ~0ull) == size);
            assert(reply_put_data_header(out, values[i], values[j], RUN_DATA_MAX, 0) == size);
            for (unsigned k = 0; k < 6; k++)
                assert(reply_put_zero_run(out, values[i], values[j], values[k]) <= size);
        }
}

int main(void)
{
    a_request_is_read();
    every_truncation_is_malformed_or_lacks_the_range();
    every_changed_byte_stays_within_bounds();
    malformed_requests_are_refused();
    unknown_fields_are_skipped();
    header_sizes();
    return 0;
}
