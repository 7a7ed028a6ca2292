/* Serialised PageRequests, for tests of a page stream: protos/postcopyd/v1/page_source.proto. Each returns its length. */
#ifndef TEST_PAGE_REQUESTS_H
#define TEST_PAGE_REQUESTS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PAGE_REQUEST_MAX 64

static uint8_t *put_field(uint8_t *at, uint8_t tag, uint64_t value)
{
    *at++ = tag;
    for (; value >= 0x80; value >>= 7)
        *at++ = (uint8_t)(value | 0x80);
    *at++ = (uint8_t)value;
    return at;
}

/* The image "vm", in runs of 4096. */
static size_t opening_request(uint8_t *message, uint64_t epoch, uint32_t max_data_bytes)
{
    uint8_t *at = message + 7;

    memcpy(message, (const uint8_t[]){ 0x0a, 0, 0x0a, 2, 'v', 'm', 0x11 }, 7);
    for (int i = 0; i < 8; i++)
        *at++ = (uint8_t)(epoch >> (8 * i));
    at = put_field(put_field(at, 0x18, 4096), 0x20, max_data_bytes);
    message[1] = (uint8_t)(at - message - 2);
    return (size_t)(at - message);
}

static size_t range_request(uint8_t *message, uint64_t id, uint64_t offset, uint64_t length, unsigned priority)
{
    uint8_t *at = put_field(put_field(message + 2, 0x08, id), 0x10, offset);

    at = put_field(put_field(at, 0x18, length), 0x20, priority);
    message[0] = 0x12;
    message[1] = (uint8_t)(at - message - 2);
    return (size_t)(at - message);
}

#endif
