/* What gRPC reads from a header list and writes to one. Values from the peer are bounded, and checked by libnghttp2. */
#ifndef POSTCOPYD_H2_HEAD_H
#define POSTCOPYD_H2_HEAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { H2_PATH_BYTES = 128, H2_TEXT_BYTES = 512 };

/* gRPC statuses that this code itself gives. */
enum grpc_status {
    GRPC_OK = 0,
    GRPC_CANCELLED = 1,
    GRPC_UNKNOWN = 2,
    GRPC_DEADLINE_EXCEEDED = 4,
    GRPC_PERMISSION_DENIED = 7,
    GRPC_RESOURCE_EXHAUSTED = 8,
    GRPC_UNIMPLEMENTED = 12,
    GRPC_INTERNAL = 13,
    GRPC_UNAVAILABLE = 14,
    GRPC_UNAUTHENTICATED = 16,
};

struct h2_head {
    uint32_t list_bytes;
    int http_status;    /* 0: none */
    int grpc_status;    /* -1: none */
    int64_t timeout_ms; /* -1: none */
    bool is_post;
    bool is_grpc;      /* content-type */
    bool is_compressed; /* a grpc-encoding other than identity */
    bool bad_timeout;
    char path[H2_PATH_BYTES]; /* "" if longer than any we know */
    char text[H2_TEXT_BYTES]; /* grpc-message, decoded and cut */
};

void h2_head_init(struct h2_head *head);
void h2_head_take(struct h2_head *head, const uint8_t *name, size_t name_len, const uint8_t *value, size_t value_len);
/* The gRPC status of an answer that has none. Source: grpc/doc/http-grpc-status-mapping.md. */
int h2_status_of_http(int http_status);
/* The gRPC status of a stream that ended by RST_STREAM. Source: PROTOCOL-HTTP2.md, "Errors". */
int h2_status_of_reset(uint32_t http2_error);
/* Percent-encode `text` for grpc-message; cut to `cap`. Returns the length. */
size_t h2_percent_encode(const char *text, char *out, size_t cap);
/* Decode, with control characters replaced, so the text can go to a log. Zero-terminated. */
void h2_percent_decode(const uint8_t *text, size_t len, char *out, size_t cap);
/* grpc-timeout: up to eight digits and a unit. Milliseconds rounded up, or -1. */
int64_t h2_timeout_parse(const uint8_t *text, size_t len);

#endif
