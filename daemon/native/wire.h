/* The destination's side of the page stream's messages: writes PageRequest, reads PageReply in place.
 *
 * protobuf wire format by hand, so that no object exists per page. Source: protos/postcopyd/v1/page_source.proto and
 * protobuf's "Encoding" document. The tests hold it against the protobuf library.
 */
#ifndef POSTCOPY_WIRE_H
#define POSTCOPY_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WIRE_RANGE_MAX 48 /* the longest encoding of one Range with its tag */

struct wire_run {
	uint64_t request_id;
	uint64_t offset;
	uint64_t len_bytes;
	uint64_t xxh3_64;
	const uint8_t *data; /* NULL: zero run */
	uint64_t data_len;
};

struct wire_reader {
	const uint8_t *at;
	const uint8_t *end;
};

/* Append one Range to `out` (room for WIRE_RANGE_MAX); returns its length. priority: 1 demand, 2 prefetch, 3 bulk. */
size_t wire_put_range(uint8_t *out, uint64_t request_id, uint64_t offset, uint64_t len_bytes, unsigned priority);

enum wire_next { WIRE_END = 0, WIRE_RUN = 1, WIRE_BAD = -1 };

/* The next run of a PageReply. Unknown fields are skipped. BAD: not protobuf. */
enum wire_next wire_next_run(struct wire_reader *reader, struct wire_run *run);

#endif
