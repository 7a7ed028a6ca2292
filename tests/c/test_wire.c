// sources: wire.c
#include <string.h>

#include "check.h"
#include "wire.h"

/* A copy of its own, so that the sanitizer sees a read beyond the end. */
static enum wire_next read_all(const uint8_t *bytes, size_t len, unsigned *runs, struct wire_run *last)
{
	uint8_t *copy = malloc(len ? len : 1);
	struct wire_reader reader = { copy, copy + len };
	struct wire_run run;
	enum wire_next next;

	CHECK(copy);
	memcpy(copy, bytes, len);
	*runs = 0;
	while ((next = wire_next_run(&reader, &run)) == WIRE_RUN) {
		++*runs;
		if (run.data) {
			CHECK(run.data >= copy && run.data_len <= len);
			CHECK(run.data + run.data_len <= copy + len);
		}
		if (last)
			*last = run;
	}
	free(copy);
	return next;
}

static void a_range_is_what_protobuf_would_write(void)
{
	static const uint8_t expected[] = { 0x12, 0x0b, 0x08, 0x81, 0x08, 0x10, 0x80, 0x20, 0x18, 0x80, 0x20, 0x20, 0x01 };
	uint8_t out[WIRE_RANGE_MAX];

	CHECK_EQ(wire_put_range(out, 1025, 4096, 4096, 1), sizeof(expected));
	CHECK(memcmp(out, expected, sizeof(expected)) == 0);
	CHECK(wire_put_range(out, UINT64_MAX, UINT64_MAX, UINT64_MAX, 3) <= WIRE_RANGE_MAX);
}

static void a_run_is_read_in_place(void)
{
	static const uint8_t message[] = {
		0x52, 0x01, 0x00, /* an unknown field, 10, bytes */
		0x0a, 0x17, 0x08, 0x05, 0x10, 0x80, 0x40, 0x18, 0x03, 0x21, 1, 2, 3, 4, 5, 6, 7, 8, 0x2a, 0x03, 'a', 'b', 'c',
		0x50, 0x01, /* behind it, unknown in the run */
	};
	struct wire_run run;
	unsigned runs;
	uint8_t copy[sizeof(message)];

	memcpy(copy, message, sizeof(message));
	CHECK_EQ(read_all(copy, sizeof(copy), &runs, &run), WIRE_END);
	CHECK_EQ(runs, 1);
	CHECK_EQ(run.request_id, 5);
	CHECK_EQ(run.offset, 8192);
	CHECK_EQ(run.len_bytes, 3);
	CHECK_EQ(run.xxh3_64, 0x0807060504030201);
	CHECK_EQ(run.data_len, 3);
}

static void every_cut_of_a_message_is_refused_or_whole(void)
{
	static const uint8_t message[] = { 0x0a, 0x17, 0x08, 0x05, 0x10, 0x80, 0x40, 0x18, 0x03, 0x21, 1,   2,  3,
					   4,	 5,    6,    7,	   8,	 0x2a, 0x05, 'a',  'b',	 'c',  'd', 'e' };
	unsigned runs;

	CHECK_EQ(read_all(message, sizeof(message), &runs, NULL), WIRE_END);
	CHECK_EQ(runs, 1);
	CHECK_EQ(read_all(message, 0, &runs, NULL), WIRE_END);
	for (size_t len = 1; len < sizeof(message); len++)
		CHECK((int)read_all(message, len, &runs, NULL) == WIRE_BAD);
}

static void what_is_not_protobuf_is_bad(void)
{
	static const struct {
		size_t len;
		uint8_t bytes[16];
	} bad[] = {
		{ 1, { 0x00 } },						   /* field number 0 */
		{ 2, { 0x0b, 0x00 } },						   /* a group */
		{ 2, { 0x08, 0x01 } },						   /* runs as a varint */
		{ 2, { 0x0a, 0x7f } },						   /* longer than the message */
		{ 12, { 0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 0x00 } }, /* longer than memory */
		{ 12, { 0x50, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00 } }, /* a varint without end */
		{ 4, { 0x0a, 0x02, 0x2d, 0x01 } },				   /* data of another type */
		{ 4, { 0x0a, 0x02, 0x20, 0x01 } },				   /* checksum as a varint */
	};
	unsigned runs;

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		CHECK((int)read_all(bad[i].bytes, bad[i].len, &runs, NULL) == WIRE_BAD);
}

static void rubbish_never_leads_astray(void)
{
	uint64_t seed = 1234;
	uint8_t bytes[64];
	unsigned runs;

	for (int round = 0; round < 200000; round++) {
		size_t len = next_random(&seed) % sizeof(bytes);

		for (size_t i = 0; i < len; i++)
			bytes[i] = (uint8_t)(next_random(&seed) >> 20);
		if (len > 2 && round % 2) {
			bytes[0] = 0x0a;
			bytes[1] = (uint8_t)(len - 2);
		}
		read_all(bytes, len, &runs, NULL);
	}
}

int main(void)
{
	a_range_is_what_protobuf_would_write();
	a_run_is_read_in_place();
	every_cut_of_a_message_is_refused_or_whole();
	what_is_not_protobuf_is_bad();
	rubbish_never_leads_astray();
	return 0;
}
