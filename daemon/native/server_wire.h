/*
 * The protobuf wire format of PageRequest and PageReply, as far as a page server needs it: requests are
 * parsed in place, replies are written in place. See protos/postcopyd/v1/page_source.proto and
 * https://protobuf.dev/programming-guides/encoding.
 */
#ifndef POSTCOPYD_SERVER_WIRE_H
#define POSTCOPYD_SERVER_WIRE_H

#include <stddef.h>
#include <stdint.h>

/* Longest header of a run, with or without data. */
#define RUN_HEADER_MAX 64u
/* Longest run with data: its length has to fit four bytes of seven bits. */
#define RUN_DATA_MAX ((size_t)1 << 27)

struct wire_reader {
    const uint8_t *at;
    const uint8_t *end;
};

/* image_id points into the message. */
struct wire_open {
    const uint8_t *image_id;
    size_t image_id_len;
    uint64_t epoch;
    uint32_t run_align;
    uint32_t max_data_bytes;
};

struct wire_range {
    uint64_t request_id;
    uint64_t offset;
    uint64_t length;
    uint32_t priority;
};

/*
 * The PageRequest's `open`: 1 present, 0 absent, -1 the message is malformed. Unknown fields are skipped;
 * groups, which proto3 has not, are refused.
 */
int request_open(const uint8_t *message, size_t len, struct wire_open *open);

/* The PageRequest's next range: 1, 0 at the end, -1 malformed. */
int request_next_range(struct wire_reader *reader, struct wire_range *range);

/*
 * A PageReply is a sequence of runs, each written here with the field header that makes it part of the
 * reply, so a message grows by appending. All return bytes written.
 */
size_t reply_put_zero_run(uint8_t *out, uint64_t request_id, uint64_t offset, uint64_t length);

/*
 * The header of a run with data has the same size whatever its length (the three lengths in it are varints
 * padded to four bytes, which every protobuf reader accepts), so the data can be read to its place before
 * it is known how much of it is one run. It is never shorter than the header of a zero run with the same id
 * and offset.
 */
size_t reply_data_header_size(uint64_t request_id, uint64_t offset);
size_t reply_put_data_header(uint8_t *out, uint64_t request_id, uint64_t offset, size_t length, uint64_t xxh3_64);

#endif
