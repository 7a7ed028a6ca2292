#include "h2_double.h"

#include <stdlib.h>
#include <string.h>

enum { COUNT, LENGTH, MODE, ARGUMENT, RANGES = 64, INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8 };

struct page_double *double_new(void) { return calloc(1, sizeof(struct page_double)); }

void double_free(struct page_double *page) { free(page); }

int double_request(void *context, const uint8_t *message, size_t len) {
    struct page_double *page = context;
    uint32_t *range = page->ranges[(page->first + page->count) % RANGES];
    if (len != sizeof *page->ranges)
        return INVALID_ARGUMENT;
    if (page->count == RANGES)
        return RESOURCE_EXHAUSTED;
    memcpy(range, message, len);
    page->requests++;
    if (range[MODE] == DOUBLE_REFUSE)
        return (int)range[ARGUMENT];
    page->count++;
    return 0;
}

ssize_t double_produce(void *context, uint8_t *out, size_t cap) {
    struct page_double *page = context;
    while (page->count && !page->ranges[page->first][COUNT]) {
        page->first = (page->first + 1) % RANGES;
        page->count--;
        page->was_read = 0;
    }
    if (!page->count)
        return 0;
    uint32_t *range = page->ranges[page->first];
    if (range[MODE] == DOUBLE_FAIL)
        return -(ssize_t)range[ARGUMENT];
    if (range[MODE] == DOUBLE_STALL && !page->was_read) {
        if (page->wants_read)
            return 0;
        page->wants_read = 1;
        return -1;
    }
    if (range[LENGTH] > cap || range[LENGTH] < 8)
        return -INVALID_ARGUMENT;
    memset(out, (int)(page->produced & 0xff), range[LENGTH]);
    memcpy(out, &page->produced, 8);
    page->produced++;
    page->bytes_produced += range[LENGTH];
    range[COUNT]--;
    return range[LENGTH];
}

const char *double_error(void *context) {
    (void)context;
    return "the double says no: 100 %";
}

void double_read(struct page_double *page) {
    page->was_read = 1;
    page->wants_read = 0;
}

int double_reply(void *context, const uint8_t *message, size_t len) {
    struct reply_double *reply = context;
    uint64_t number = 0;
    if (len >= 8)
        memcpy(&number, message, 8);
    uint8_t fill = (uint8_t)number;
    if (len < 8 || number != reply->messages || (len > 8 && (message[8] != fill || message[len - 1] != fill)))
        reply->wrong++;
    reply->messages++;
    reply->bytes += len;
    return reply->refuse_at == reply->messages ? -1 : 0;
}
