#include "server_wire.h"

#include <string.h>

enum wire_type { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };

#define TAG(number, type) ((uint8_t)((number) << 3 | (type)))

enum {
    REQUEST_OPEN = 1,
    REQUEST_RANGES = 2,

    OPEN_IMAGE_ID = 1,
    OPEN_EPOCH = 2,
    OPEN_RUN_ALIGN = 3,
    OPEN_MAX_DATA_BYTES = 4,

    RANGE_REQUEST_ID = 1,
    RANGE_OFFSET = 2,
    RANGE_LENGTH = 3,
    RANGE_PRIORITY = 4,

    REPLY_RUNS = 1,

    RUN_REQUEST_ID = 1,
    RUN_OFFSET = 2,
    RUN_LENGTH = 3,
    RUN_XXH3_64 = 4,
    RUN_DATA = 5,
};

/* value: of a VARINT or FIXED; the length of BYTES, which begin at `bytes`. */
struct field {
    uint32_t number;
    uint32_t type;
    uint64_t value;
    const uint8_t *bytes;
};

static int read_varint(struct wire_reader *reader, uint64_t *value)
{
    *value = 0;
    for (unsigned shift = 0; shift < 70 && reader->at < reader->end; shift += 7) {
        uint8_t byte = *reader->at++;
        /* The tenth byte carries the one bit that is left. */
        if (shift == 63 && byte > 1)
            return -1;
        *value |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80)
            return 0;
    }
    return -1;
}

static int read_fixed(struct wire_reader *reader, size_t size, uint64_t *value)
{
    if ((size_t)(reader->end - reader->at) < size)
        return -1;
    *value = 0;
    for (size_t i = 0; i < size; i++)
        *value |= (uint64_t)reader->at[i] << (8 * i);
    reader->at += size;
    return 0;
}

static int read_bytes(struct wire_reader *reader, struct field *field)
{
    if (read_varint(reader, &field->value) || field->value > (size_t)(reader->end - reader->at))
        return -1;
    field->bytes = reader->at;
    reader->at += field->value;
    return 0;
}

/* 1: a field; 0: the end; -1: malformed. */
static int next_field(struct wire_reader *reader, struct field *field)
{
    uint64_t tag;
    int error;

    if (reader->at == reader->end)
        return 0;
    if (read_varint(reader, &tag) || tag > UINT32_MAX || tag >> 3 == 0)
        return -1;
    field->number = (uint32_t)(tag >> 3);
    field->type = tag & 7;
    switch (field->type) {
    case VARINT:
        error = read_varint(reader, &field->value);
        break;
    case FIXED64:
        error = read_fixed(reader, 8, &field->value);
        break;
    case BYTES:
        error = read_bytes(reader, field);
        break;
    case FIXED32:
        error = read_fixed(reader, 4, &field->value);
        break;
    default:
        return -1;
    }
    return error ? -1 : 1;
}

static struct wire_reader within(const struct field *field)
{
    return (struct wire_reader){ .at = field->bytes, .end = field->bytes + field->value };
}

/* A known number with another wire type than ours is an unknown field, as in every protobuf reader. */
static int parse_open(struct wire_reader reader, struct wire_open *open)
{
    struct field field;
    int more;

    while ((more = next_field(&reader, &field)) > 0) {
        if (field.number == OPEN_IMAGE_ID && field.type == BYTES) {
            open->image_id = field.bytes;
            open->image_id_len = field.value;
        } else if (field.number == OPEN_EPOCH && field.type == FIXED64) {
            open->epoch = field.value;
        } else if (field.number == OPEN_RUN_ALIGN && field.type == VARINT) {
            open->run_align = (uint32_t)field.value;
        } else if (field.number == OPEN_MAX_DATA_BYTES && field.type == VARINT) {
            open->max_data_bytes = (uint32_t)field.value;
        }
    }
    return more;
}

static int parse_range(struct wire_reader reader, struct wire_range *range)
{
    struct field field;
    int more;

    *range = (struct wire_range){ 0 };
    while ((more = next_field(&reader, &field)) > 0) {
        if (field.type != VARINT)
            continue;
        if (field.number == RANGE_REQUEST_ID)
            range->request_id = field.value;
        else if (field.number == RANGE_OFFSET)
            range->offset = field.value;
        else if (field.number == RANGE_LENGTH)
            range->length = field.value;
        else if (field.number == RANGE_PRIORITY)
            range->priority = (uint32_t)field.value;
    }
    return more;
}

int request_open(const uint8_t *message, size_t len, struct wire_open *open)
{
    struct wire_reader reader = { .at = message, .end = message + len };
    struct field field;
    int found = 0;
    int more;

    *open = (struct wire_open){ .image_id = message };
    while ((more = next_field(&reader, &field)) > 0) {
        if (field.number != REQUEST_OPEN || field.type != BYTES)
            continue;
        /* Parts of one sub-message that come separately are merged. */
        if (parse_open(within(&field), open))
            return -1;
        found = 1;
    }
    return more ? -1 : found;
}

int request_next_range(struct wire_reader *reader, struct wire_range *range)
{
    struct field field;
    int more;

    while ((more = next_field(reader, &field)) > 0)
        if (field.number == REQUEST_RANGES && field.type == BYTES)
            return parse_range(within(&field), range) ? -1 : 1;
    return more;
}

static size_t varint_size(uint64_t value)
{
    size_t size = 1;

    while (value >= 0x80) {
        value >>= 7;
        size++;
    }
    return size;
}

static uint8_t *put_varint(uint8_t *out, uint64_t value)
{
    while (value >= 0x80) {
        *out++ = (uint8_t)(value | 0x80);
        value >>= 7;
    }
    *out++ = (uint8_t)value;
    return out;
}

enum { PADDED = 4 };

static uint8_t *put_padded_varint(uint8_t *out, uint64_t value)
{
    for (int i = 0; i < PADDED - 1; i++, value >>= 7)
        *out++ = (uint8_t)(value | 0x80);
    *out++ = (uint8_t)(value & 0x7f);
    return out;
}

static uint8_t *put_field(uint8_t *out, uint8_t tag, uint64_t value)
{
    *out++ = tag;
    return put_varint(out, value);
}

size_t reply_put_zero_run(uint8_t *out, uint64_t request_id, uint64_t offset, uint64_t length)
{
    uint8_t *at = out;
    size_t body = 3 + varint_size(request_id) + varint_size(offset) + varint_size(length);

    at = put_field(at, TAG(REPLY_RUNS, BYTES), body);
    at = put_field(at, TAG(RUN_REQUEST_ID, VARINT), request_id);
    at = put_field(at, TAG(RUN_OFFSET, VARINT), offset);
    at = put_field(at, TAG(RUN_LENGTH, VARINT), length);
    return (size_t)(at - out);
}

/* Of the run itself, so without the tag and the length that make it a part of the reply. */
static size_t data_run_header_size(uint64_t request_id, uint64_t offset)
{
    return 1 + varint_size(request_id) + 1 + varint_size(offset) + (1 + PADDED) + (1 + 8) + (1 + PADDED);
}

size_t reply_data_header_size(uint64_t request_id, uint64_t offset)
{
    return 1 + PADDED + data_run_header_size(request_id, offset);
}

size_t reply_put_data_header(uint8_t *out, uint64_t request_id, uint64_t offset, size_t length, uint64_t xxh3_64)
{
    uint8_t *at = out;

    *at++ = TAG(REPLY_RUNS, BYTES);
    at = put_padded_varint(at, data_run_header_size(request_id, offset) + length);
    at = put_field(at, TAG(RUN_REQUEST_ID, VARINT), request_id);
    at = put_field(at, TAG(RUN_OFFSET, VARINT), offset);
    *at++ = TAG(RUN_LENGTH, VARINT);
    at = put_padded_varint(at, length);
    *at++ = TAG(RUN_XXH3_64, FIXED64);
    for (int i = 0; i < 8; i++)
        *at++ = (uint8_t)(xxh3_64 >> (8 * i));
    *at++ = TAG(RUN_DATA, BYTES);
    at = put_padded_varint(at, length);
    return (size_t)(at - out);
}
