#include "h2_head.h"

#include <string.h>

#include <nghttp2/nghttp2.h>

enum { FIELD_OVERHEAD = 32 /* RFC 9113, 6.5.2 */, TIMEOUT_DIGITS = 8 };

void h2_head_init(struct h2_head *head) {
    memset(head, 0, sizeof *head);
    head->grpc_status = -1;
    head->timeout_ms = -1;
}

static bool is(const uint8_t *text, size_t len, const char *expected) {
    return len == strlen(expected) && memcmp(text, expected, len) == 0;
}

/* A decimal of up to `digits`, or -1. */
static int64_t decimal(const uint8_t *text, size_t len, size_t digits) {
    int64_t value = 0;
    if (!len || len > digits)
        return -1;
    for (size_t i = 0; i < len; i++) {
        if (text[i] < '0' || text[i] > '9')
            return -1;
        value = value * 10 + (text[i] - '0');
    }
    return value;
}

int64_t h2_timeout_parse(const uint8_t *text, size_t len) {
    static const struct {
        char unit;
        int64_t ns;
    } units[] = {{'n', 1},          {'u', 1000},         {'m', 1000000},
                 {'S', 1000000000}, {'M', 60000000000LL}, {'H', 3600000000000LL}};
    int64_t value = len ? decimal(text, len - 1, TIMEOUT_DIGITS) : -1;
    if (value < 0)
        return -1;
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        if (text[len - 1] != units[i].unit)
            continue;
        /* 99999999 hours are more nanoseconds than an int64 holds, so hours go by milliseconds. */
        if (units[i].ns >= 1000000)
            return value * (units[i].ns / 1000000);
        return (value * units[i].ns + 999999) / 1000000;
    }
    return -1;
}

static bool is_grpc_type(const uint8_t *value, size_t len) {
    static const char type[] = "application/grpc";
    size_t type_len = sizeof type - 1;
    if (len < type_len || memcmp(value, type, type_len) != 0)
        return false;
    return len == type_len || value[type_len] == '+' || value[type_len] == ';';
}

void h2_head_take(struct h2_head *head, const uint8_t *name, size_t name_len, const uint8_t *value, size_t value_len) {
    head->list_bytes += (uint32_t)(name_len + value_len + FIELD_OVERHEAD);
    if (is(name, name_len, ":path")) {
        if (value_len < sizeof head->path)
            memcpy(head->path, value, value_len);
    } else if (is(name, name_len, ":method")) {
        head->is_post = is(value, value_len, "POST");
    } else if (is(name, name_len, ":status")) {
        head->http_status = (int)decimal(value, value_len, 3);
    } else if (is(name, name_len, "content-type")) {
        head->is_grpc = is_grpc_type(value, value_len);
    } else if (is(name, name_len, "grpc-encoding")) {
        head->is_compressed = !is(value, value_len, "identity");
    } else if (is(name, name_len, "grpc-timeout")) {
        head->timeout_ms = h2_timeout_parse(value, value_len);
        head->bad_timeout = head->timeout_ms < 0;
    } else if (is(name, name_len, "grpc-status")) {
        int64_t status = decimal(value, value_len, 2);
        head->grpc_status = status < 0 || status > GRPC_UNAUTHENTICATED ? GRPC_UNKNOWN : (int)status;
    } else if (is(name, name_len, "grpc-message")) {
        h2_percent_decode(value, value_len, head->text, sizeof head->text);
    }
}

int h2_status_of_http(int http_status) {
    switch (http_status) {
    case 400:
        return GRPC_INTERNAL;
    case 401:
        return GRPC_UNAUTHENTICATED;
    case 403:
        return GRPC_PERMISSION_DENIED;
    case 404:
        return GRPC_UNIMPLEMENTED;
    case 429:
    case 502:
    case 503:
    case 504:
        return GRPC_UNAVAILABLE;
    default:
        return GRPC_UNKNOWN;
    }
}

int h2_status_of_reset(uint32_t http2_error) {
    switch (http2_error) {
    case NGHTTP2_REFUSED_STREAM:
        return GRPC_UNAVAILABLE;
    case NGHTTP2_CANCEL:
        return GRPC_CANCELLED;
    case NGHTTP2_ENHANCE_YOUR_CALM:
        return GRPC_RESOURCE_EXHAUSTED;
    case NGHTTP2_INADEQUATE_SECURITY:
        return GRPC_PERMISSION_DENIED;
    default:
        return GRPC_INTERNAL;
    }
}

size_t h2_percent_encode(const char *text, char *out, size_t cap) {
    static const char hex[] = "0123456789ABCDEF";
    size_t len = 0;
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        bool plain = c >= 0x20 && c <= 0x7E && c != '%';
        if (len + (plain ? 1 : 3) > cap)
            break;
        if (plain) {
            out[len++] = (char)c;
            continue;
        }
        out[len++] = '%';
        out[len++] = hex[c >> 4];
        out[len++] = hex[c & 15];
    }
    return len;
}

static int hex_digit(uint8_t c) {
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

void h2_percent_decode(const uint8_t *text, size_t len, char *out, size_t cap) {
    size_t at = 0;
    for (size_t i = 0; i < len && at + 1 < cap; i++) {
        uint8_t c = text[i];
        /* "Must not fail on invalid sequences": they stay as they are. */
        if (c == '%' && i + 2 < len && hex_digit(text[i + 1]) >= 0 && hex_digit(text[i + 2]) >= 0) {
            c = (uint8_t)(hex_digit(text[i + 1]) << 4 | hex_digit(text[i + 2]));
            i += 2;
        }
        out[at++] = c < 0x20 || c == 0x7F ? ' ' : (char)c;
    }
    out[at] = 0;
}
