#include "wire.h"

enum { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };

#define TAG(field, type) ((uint8_t)((field) << 3 | (type)))

static size_t put_varint(uint8_t *out, uint64_t value)
{
	size_t n = 0;

	while (value >= 0x80) {
		out[n++] = (uint8_t)(value | 0x80);
		value >>= 7;
	}
	out[n++] = (uint8_t)value;
	return n;
}

static bool get_varint(struct wire_reader *r, uint64_t *value)
{
	*value = 0;
	for (unsigned shift = 0; shift < 64; shift += 7) {
		uint8_t byte;

		if (r->at == r->end)
			return false;
		byte = *r->at++;
		*value |= (uint64_t)(byte & 0x7f) << shift;
		if (!(byte & 0x80))
			return true;
	}
	return false;
}

struct field {
	uint64_t number;
	unsigned type;
	uint64_t value; /* VARINT, FIXED64, FIXED32; length of BYTES */
	const uint8_t *bytes;
};

static bool get_fixed(struct wire_reader *r, unsigned len, uint64_t *value)
{
	if ((size_t)(r->end - r->at) < len)
		return false;
	*value = 0;
	for (unsigned i = 0; i < len; i++)
		*value |= (uint64_t)r->at[i] << 8 * i;
	r->at += len;
	return true;
}

static bool get_field(struct wire_reader *r, struct field *f)
{
	uint64_t tag;

	if (!get_varint(r, &tag) || tag >> 3 == 0)
		return false;
	f->number = tag >> 3;
	f->type = tag & 7;
	switch (f->type) {
	case VARINT:
		return get_varint(r, &f->value);
	case FIXED64:
		return get_fixed(r, 8, &f->value);
	case FIXED32:
		return get_fixed(r, 4, &f->value);
	case BYTES:
		if (!get_varint(r, &f->value) || f->value > (size_t)(r->end - r->at))
			return false;
		f->bytes = r->at;
		r->at += f->value;
		return true;
	default:
		return false;
	}
}

size_t wire_put_range(uint8_t *out, uint64_t request_id, uint64_t offset, uint64_t len_bytes, unsigned priority)
{
	uint8_t body[WIRE_RANGE_MAX];
	size_t n = 0, head = 0;

	body[n++] = TAG(1, VARINT);
	n += put_varint(body + n, request_id);
	if (offset) {
		body[n++] = TAG(2, VARINT);
		n += put_varint(body + n, offset);
	}
	body[n++] = TAG(3, VARINT);
	n += put_varint(body + n, len_bytes);
	body[n++] = TAG(4, VARINT);
	n += put_varint(body + n, priority);

	out[head++] = TAG(2, BYTES);
	head += put_varint(out + head, n);
	for (size_t i = 0; i < n; i++)
		out[head + i] = body[i];
	return head + n;
}

static bool get_run(struct wire_reader r, struct wire_run *run)
{
	struct field f;

	*run = (struct wire_run){ 0 };
	while (r.at != r.end) {
		if (!get_field(&r, &f))
			return false;
		if (f.number == 1 && f.type == VARINT)
			run->request_id = f.value;
		else if (f.number == 2 && f.type == VARINT)
			run->offset = f.value;
		else if (f.number == 3 && f.type == VARINT)
			run->len_bytes = f.value;
		else if (f.number == 4 && f.type == FIXED64)
			run->xxh3_64 = f.value;
		else if (f.number == 5 && f.type == BYTES) {
			run->data = f.value ? f.bytes : NULL;
			run->data_len = f.value;
		} else if (f.number <= 5)
			return false; /* a known field of another type */
	}
	return true;
}

enum wire_next wire_next_run(struct wire_reader *reader, struct wire_run *run)
{
	struct field f;

	while (reader->at != reader->end) {
		if (!get_field(reader, &f))
			return WIRE_BAD;
		if (f.number != 1)
			continue;
		if (f.type != BYTES)
			return WIRE_BAD;
		return get_run((struct wire_reader){ f.bytes, f.bytes + f.value }, run) ? WIRE_RUN : WIRE_BAD;
	}
	return WIRE_END;
}
