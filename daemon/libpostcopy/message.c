#include "message.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LENGTH_BYTES 4u

struct text {
	char *at;
	size_t len; /* may exceed the capacity: then nothing more is written, and it is too long */
	size_t capacity;
};

__attribute__((format(printf, 2, 3))) static void append(struct text *text, const char *format, ...)
{
	size_t room = text->len < text->capacity ? text->capacity - text->len : 0;
	va_list arguments;
	int written;

	va_start(arguments, format);
	written = vsnprintf(room ? text->at + text->len : NULL, room, format, arguments);
	va_end(arguments);
	text->len += (size_t)written;
}

static void append_regions(struct text *text, const struct postcopy *pc)
{
	for (size_t i = 0; i < pc->regions; i++) {
		const struct postcopy_region *region = &pc->region[i];

		append(text,
		       "%s{\"guest_phys_addr\":%" PRIu64 ",\"host_virt_addr\":%" PRIu64 ",\"size\":%" PRIu64
		       ",\"backing_file_offset\":%" PRIu64 ",\"page_size\":%" PRIu64 "}",
		       i ? "," : "", region->gpa, region->hva, region->size, region->image_offset, region->page_size);
	}
}

static void append_pinned(struct text *text, const struct postcopy *pc)
{
	for (size_t i = 0; i < pc->pinned_count; i++)
		append(text, "%s{\"gpa\":%" PRIu64 ",\"size\":%" PRIu64 "}", i ? "," : "", pc->pinned[i].gpa,
		       pc->pinned[i].size);
}

int message_build(const struct postcopy *pc, uint8_t **frame, size_t *len)
{
	uint8_t *memory = malloc(MESSAGE_BYTES_MAX);
	struct text text = { (char *)memory + LENGTH_BYTES, 0, MESSAGE_BYTES_MAX - LENGTH_BYTES };
	uint32_t length;

	if (!memory)
		return -ENOMEM;
	append(&text, "{\"type\":\"handoff\",\"version\":0,\"vmm_pid\":%u,\"mode\":\"MISSING\",\"regions\":[",
	       (unsigned)getpid());
	append_regions(&text, pc);
	append(&text, "],\"descriptors\":[\"uffd\",\"exit_ring\",\"exit_notify\"%s],\"vcpus\":%u,\"pinned\":[",
	       pc->image_fd >= 0 ? ",\"image\"" : "", pc->ring.vcpus);
	append_pinned(&text, pc);
	append(&text, "]}");
	/* vsnprintf wants room for its terminator too. */
	if (text.len >= text.capacity) {
		free(memory);
		return -EMSGSIZE;
	}
	length = (uint32_t)text.len;
	memcpy(memory, &length, LENGTH_BYTES);
	*frame = memory;
	*len = LENGTH_BYTES + text.len;
	return 0;
}
