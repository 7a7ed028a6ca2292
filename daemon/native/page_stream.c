#include "page_stream.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checksum.h"
#include "cold_read.h"
#include "range_queue.h"
#include "server_wire.h"
#include "zero.h"

enum {
    /* A thread waits for a demand page, so its message does not wait for many others to be read. */
    DEMAND_DATA_MAX = 32 << 10,
    /* Below this, reading zeros costs less than asking where the hole ends. */
    HOLE_PROBE_MIN = 64 << 10,
    /* Below this, a read costs less than asking what is in memory and the fault of looking. */
    IN_PLACE_MIN = 16 << 10,
    /* Bounds the system calls of one ps_produce when ranges are many and zero. */
    SLICES_MAX = 512,
};

struct page_stream {
    const struct image_catalog *catalog;
    struct image *image;
    struct ps_limits limits;
    uint32_t run_align;
    uint32_t max_data_bytes;
    struct range_queue queue;
    struct cold_read cold;
    /* End of the last slice if that was zero at its end: a hole may follow. */
    uint64_t zero_until;
    uint64_t answered;
    int failed;
    char error[256];
};

/*
 * A message under construction. `budget` bounds what is still read for it, zeros included: a gigabyte of
 * zero pages must not be read before the first of them is answered. The last run, if zero, can be
 * lengthened.
 */
struct message {
    uint8_t *out;
    size_t cap;
    size_t used;
    size_t budget;
    uint64_t data_bytes;
    uint64_t zero_bytes;
    struct {
        size_t at;
        uint64_t request_id;
        uint64_t offset;
        uint64_t end;
    } last_zero;
};

/* Outcome of answering a slice, beside the errors of image.h. */
enum { ANSWERED = 0, FULL = 1 };

void *ps_new(const struct image_catalog *catalog, struct ps_limits limits)
{
    struct page_stream *s = calloc(1, sizeof *s);

    if (!s)
        return NULL;
    s->catalog = catalog;
    s->limits = limits;
    range_queue_init(&s->queue, limits.max_ranges);
    cold_read_init(&s->cold);
    return s;
}

void ps_free(void *stream)
{
    struct page_stream *s = stream;

    if (!s)
        return;
    range_queue_deinit(&s->queue);
    cold_read_deinit(&s->cold);
    free(s);
}

__attribute__((format(printf, 3, 4)))
static int fail(struct page_stream *s, enum ps_status status, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(s->error, sizeof s->error, format, args);
    va_end(args);
    s->failed = (int)status;
    return s->failed;
}

void ps_refuse(void *stream, int status, const char *message)
{
    fail(stream, (enum ps_status)status, "%s", message);
}

static int check_open(struct page_stream *s, const struct wire_open *open)
{
    uint32_t align = open->run_align;

    if (align < IMAGE_PAGE || align > PS_RUN_ALIGN_MAX || align & (align - 1))
        return fail(s, PS_INVALID_ARGUMENT, "run_align %u is not a power of two from %u to %u", align, IMAGE_PAGE,
                    PS_RUN_ALIGN_MAX);
    if (open->max_data_bytes < align)
        return fail(s, PS_INVALID_ARGUMENT, "max_data_bytes %u is below run_align %u", open->max_data_bytes, align);
    return 0;
}

static int open_image(struct page_stream *s, const struct wire_open *open)
{
    uint32_t max_data = open->max_data_bytes;
    struct image *image;

    if (check_open(s, open))
        return s->failed;
    image = image_catalog_find(s->catalog, (const char *)open->image_id, open->image_id_len);
    if (!image)
        return fail(s, PS_NOT_FOUND, "this source has no such image");
    if (open->epoch != image_epoch(image))
        return fail(s, PS_FAILED_PRECONDITION, "the image's epoch is %016llx, not %016llx: other content",
                    (unsigned long long)image_epoch(image), (unsigned long long)open->epoch);
    s->image = image;
    if (max_data > s->limits.max_data_bytes)
        max_data = s->limits.max_data_bytes;
    s->run_align = open->run_align;
    s->max_data_bytes = max_data < s->run_align ? s->run_align : max_data & ~(s->run_align - 1);
    return 0;
}

static int accept_range(struct page_stream *s, const struct wire_range *range)
{
    unsigned long long offset = range->offset;
    unsigned long long length = range->length;
    enum priority priority =
        range->priority == PRIORITY_DEMAND || range->priority == PRIORITY_PREFETCH ? range->priority : PRIORITY_BULK;

    if (length == 0 || (offset | length) & (s->run_align - 1))
        return fail(s, PS_INVALID_ARGUMENT, "range [%llu, +%llu) is empty or not aligned to %u", offset, length,
                    s->run_align);
    if (length > s->limits.max_range_bytes)
        return fail(s, PS_INVALID_ARGUMENT, "range [%llu, +%llu) is longer than max_range_bytes", offset, length);
    if (offset > image_size(s->image) || length > image_size(s->image) - offset)
        return fail(s, PS_OUT_OF_RANGE, "range [%llu, +%llu) is beyond the image of %llu bytes", offset, length,
                    (unsigned long long)image_size(s->image));
    if (!range_queue_push(&s->queue, priority, range->request_id, offset, offset + length))
        return fail(s, PS_RESOURCE_EXHAUSTED, "more than %u ranges are outstanding", s->limits.max_ranges);
    return 0;
}

/* `open` may follow ranges on the wire, as fields of a message have no order; so it is looked for first. */
int ps_request(void *stream, const uint8_t *message, size_t len)
{
    struct page_stream *s = stream;
    struct wire_reader reader = { .at = message, .end = message + len };
    struct wire_open open;
    struct wire_range range;
    int found;

    if (s->failed)
        return s->failed;
    if (len > PS_REQUEST_MAX)
        return fail(s, PS_RESOURCE_EXHAUSTED, "a request of %zu bytes is longer than %u", len, PS_REQUEST_MAX);
    found = request_open(message, len, &open);
    if (found < 0)
        return fail(s, PS_INVALID_ARGUMENT, "a request is no valid PageRequest");
    if (found == (s->image != NULL))
        return fail(s, PS_INVALID_ARGUMENT, found ? "`open` came twice" : "the first request has no `open`");
    if (found && open_image(s, &open))
        return s->failed;
    if (image_is_released(s->image))
        return fail(s, PS_NOT_FOUND, "the image was released");
    while ((found = request_next_range(&reader, &range)) > 0)
        if (accept_range(s, &range))
            return s->failed;
    return found < 0 ? fail(s, PS_INVALID_ARGUMENT, "a range is malformed") : 0;
}

static void write_last_zero(struct message *m)
{
    m->used = m->last_zero.at;
    m->used += reply_put_zero_run(m->out + m->used, m->last_zero.request_id, m->last_zero.offset,
                                  m->last_zero.end - m->last_zero.offset);
}

static void put_zero(struct message *m, uint64_t request_id, uint64_t offset, uint64_t len)
{
    bool adjoins = m->last_zero.end == offset && m->last_zero.end && m->last_zero.request_id == request_id;

    m->zero_bytes += len;
    if (!adjoins) {
        m->last_zero.at = m->used;
        m->last_zero.request_id = request_id;
        m->last_zero.offset = offset;
    }
    m->last_zero.end = offset + len;
    write_last_zero(m);
}

/*
 * Bytes that were read lie in place mostly: a run moves only when a zero run before it, in the same slice, left room. Those of
 * the image itself are copied, and the checksum is of the copy.
 */
static void put_data(struct message *m, uint64_t request_id, uint64_t offset, const uint8_t *data, size_t len)
{
    size_t header = reply_data_header_size(request_id, offset);
    uint8_t *place = m->out + m->used + header;

    if (place != data)
        memmove(place, data, len);
    reply_put_data_header(m->out + m->used, request_id, offset, len, checksum_run(place, len, offset));
    m->used += header + len;
    m->data_bytes += len;
    m->last_zero.end = 0;
}

/*
 * Cut what was read, at least one block, into runs. Headers never overtake the bytes not yet looked at: a zero run's header fits
 * where the first header was left free, and each zero run frees at least a page for the header of the data
 * run behind it.
 */
static void put_slice(struct page_stream *s, struct message *m, struct range *range, const uint8_t *data,
                      size_t len)
{
    bool zero = false;

    while (len) {
        size_t run = run_length(data, len, s->run_align, &zero);
        if (zero)
            put_zero(m, range->request_id, range->offset, run);
        else
            put_data(m, range->request_id, range->offset, data, run);
        range->offset += run;
        data += run;
        len -= run;
    }
    s->zero_until = zero ? range->offset : 0;
}

/* Answer what of the range lies in the hole; whether that is a whole run. */
static bool put_hole(const struct page_stream *s, struct message *m, struct range *range, uint64_t hole_end)
{
    uint64_t end = hole_end < range->end ? hole_end & ~((uint64_t)s->run_align - 1) : range->end;

    if (end <= range->offset)
        return false;
    put_zero(m, range->request_id, range->offset, end - range->offset);
    range->offset = end;
    return true;
}

/* Bytes of the range that the message still takes, whole runs; 0 when it is full. */
static size_t slice_len(const struct page_stream *s, const struct message *m, const struct range *range)
{
    size_t len = m->budget;
    size_t room = m->cap - m->used;

    if (room < RUN_HEADER_MAX)
        return 0;
    if (len > room - RUN_HEADER_MAX)
        len = room - RUN_HEADER_MAX;
    if (len > range->end - range->offset)
        len = (size_t)(range->end - range->offset);
    return len & ~((size_t)s->run_align - 1);
}

/* What another thread has read or found for this offset. */
static int answer_from_cold_read(struct page_stream *s, struct message *m, struct range *range, uint8_t *place,
                                 size_t len)
{
    struct cold_read *cold = &s->cold;

    if (cold->hole_end) {
        put_hole(s, m, range, cold->hole_end);
    } else if (cold->result < 0) {
        return (int)cold->result;
    } else {
        if (len > (size_t)cold->result)
            len = (size_t)cold->result;
        memcpy(place, cold->buffer, len);
        m->budget -= len;
        put_slice(s, m, range, place, len);
    }
    cold_read_take(cold);
    return ANSWERED;
}

/*
 * Whether to ask the kernel for a hole before reading. In memory it always pays for a long range. On a disk the
 * question may wait for the file's block map, so it is asked only behind zeros: a terabyte of hole must not be read
 * a slice at a time.
 */
static bool is_hole_likely(const struct page_stream *s, const struct range *range)
{
    if (range->end - range->offset <= HOLE_PROBE_MIN)
        return false;
    return image_in_memory(s->image) || (s->zero_until == range->offset && range->offset != 0);
}

/* put_slice of bytes that lie in the image itself. */
struct in_place {
    struct page_stream *stream;
    struct message *message;
    struct range *range;
    size_t len;
};

static void put_in_place(void *context, const uint8_t *bytes)
{
    struct in_place *w = context;

    w->message->budget -= w->len;
    put_slice(w->stream, w->message, w->range, bytes, w->len);
}

/* Without a read, if all of the slice is in memory; what was begun when that turned out not to be so is undone. */
static bool answer_in_place(struct page_stream *s, struct message *m, struct range *range, size_t len)
{
    struct in_place w = { .stream = s, .message = m, .range = range, .len = len };
    const struct message message = *m;
    const struct range whole = *range;

    if (image_look(s->image, range->offset, len, put_in_place, &w))
        return true;
    *m = message;
    /* It may have been lengthened. */
    if (m->last_zero.end)
        write_last_zero(m);
    *range = whole;
    return false;
}

/* Answer the next slice of a range: ANSWERED, FULL, or an error of image.h. */
static int answer_slice(struct page_stream *s, struct message *m, struct range *range)
{
    uint8_t *place = m->out + m->used + reply_data_header_size(range->request_id, range->offset);
    size_t len = slice_len(s, m, range);
    ssize_t n;

    if (len == 0)
        return FULL;
    if (cold_read_has(&s->cold, range->offset))
        return answer_from_cold_read(s, m, range, place, len);
    if (is_hole_likely(s, range)) {
        int64_t data = image_next_data(s->image, range->offset);
        if (data < 0)
            return (int)data;
        if (put_hole(s, m, range, (uint64_t)data))
            return ANSWERED;
    }
    if (len >= IN_PLACE_MIN && answer_in_place(s, m, range, len))
        return ANSWERED;
    n = image_read(s->image, place, len, range->offset, false);
    if (n < 0)
        return (int)n;
    n &= ~((ssize_t)s->run_align - 1);
    if (n == 0)
        return IMAGE_WOULD_BLOCK;
    m->budget -= (size_t)n;
    put_slice(s, m, range, place, (size_t)n);
    return ANSWERED;
}

static ssize_t want_cold_read(struct page_stream *s, const struct message *m, const struct range *range)
{
    if (cold_read_is_pending(&s->cold))
        return 0;
    if (!cold_read_want(&s->cold, s->image, range->offset, slice_len(s, m, range), s->run_align))
        return -fail(s, PS_RESOURCE_EXHAUSTED, "no memory to read the image");
    return PS_WOULD_BLOCK;
}

static ssize_t fail_read(struct page_stream *s, int error, uint64_t offset)
{
    switch (error) {
    case IMAGE_RELEASED:
        return -fail(s, PS_NOT_FOUND, "the image was released");
    case IMAGE_SHRANK:
        return -fail(s, PS_DATA_LOSS, "the image's file became shorter than its %llu bytes",
                     (unsigned long long)image_size(s->image));
    default:
        return -fail(s, PS_DATA_LOSS, "reading the image at %llu failed: %s", (unsigned long long)offset,
                     strerror(-error));
    }
}

/* Why not even one slice was answered. */
static ssize_t explain_empty(struct page_stream *s, const struct message *m, const struct range *range, int outcome)
{
    if (outcome == FULL)
        return -fail(s, PS_INTERNAL, "a buffer of %zu bytes holds no run of %u", m->cap, s->run_align);
    if (outcome == IMAGE_WOULD_BLOCK)
        return want_cold_read(s, m, range);
    return fail_read(s, outcome, range->offset);
}

static size_t message_budget(const struct page_stream *s, enum priority priority)
{
    if (priority != PRIORITY_DEMAND || s->max_data_bytes < DEMAND_DATA_MAX)
        return s->max_data_bytes;
    return s->run_align > DEMAND_DATA_MAX ? s->run_align : DEMAND_DATA_MAX;
}

/* An error or a read that would block, met after the first slice, is met again by the next call. */
ssize_t ps_produce(void *stream, uint8_t *out, size_t cap)
{
    struct page_stream *s = stream;
    enum priority priority = range_queue_first(&s->queue);
    struct message m = { .out = out, .cap = cap };
    struct range *range;
    int outcome = ANSWERED;

    if (s->failed)
        return -s->failed;
    if (!priority)
        return 0;
    m.budget = message_budget(s, priority);
    for (int slices = 0; slices < SLICES_MAX && (range = range_queue_head(&s->queue, priority)); slices++) {
        outcome = answer_slice(s, &m, range);
        if (outcome != ANSWERED)
            break;
        if (range->offset == range->end)
            range_queue_pop(&s->queue, priority);
    }
    if (m.used == 0)
        return explain_empty(s, &m, range, outcome);
    s->answered += m.data_bytes + m.zero_bytes;
    image_count(s->image, m.data_bytes, m.zero_bytes);
    return (ssize_t)m.used;
}

void ps_read_blocking(void *stream)
{
    struct page_stream *s = stream;

    cold_read_run(&s->cold);
}

const char *ps_error(void *stream)
{
    struct page_stream *s = stream;

    return s->error;
}

size_t ps_message_max(void *stream)
{
    struct page_stream *s = stream;
    size_t data = s->limits.max_data_bytes > PS_RUN_ALIGN_MAX ? s->limits.max_data_bytes : PS_RUN_ALIGN_MAX;

    return data + PS_MESSAGE_OVERHEAD;
}

uint32_t ps_outstanding(void *stream)
{
    struct page_stream *s = stream;

    return s->queue.count;
}

uint64_t ps_answered(void *stream)
{
    struct page_stream *s = stream;

    return s->answered;
}
