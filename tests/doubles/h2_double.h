/*
 * A page stream for tests: a request says how many messages of what length to answer with, and how to misbehave. Built as
 * a shared library for the Python tests (tests/h2_double.py) and linked into the C tests.
 *
 * Request: u32 count, u32 length, u32 mode, u32 argument; little endian. Reply: `length` bytes (at least 8): u64 number of the
 * message in the stream, then bytes of (number & 0xff).
 */
#ifndef H2_DOUBLE_H
#define H2_DOUBLE_H

#include <stdint.h>
#include <sys/types.h>

enum double_mode {
    DOUBLE_ANSWER = 0,
    DOUBLE_REFUSE = 1, /* the request ends the stream with status `argument` */
    DOUBLE_FAIL = 2,   /* produce ends it */
    DOUBLE_STALL = 3,  /* produce would block until double_read */
};

struct page_double {
    uint32_t ranges[64][4];
    uint32_t first, count;
    uint64_t produced;
    uint64_t bytes_produced;
    int wants_read;
    int was_read;
    uint64_t requests;
};

/* Takes replies and checks them. */
struct reply_double {
    uint64_t messages;
    uint64_t bytes;
    uint64_t wrong;
    uint64_t refuse_at; /* the message to refuse, counted from 1; 0: none */
};

struct page_double *double_new(void);
void double_free(struct page_double *page);
int double_request(void *context, const uint8_t *message, size_t len);
ssize_t double_produce(void *context, uint8_t *out, size_t cap);
const char *double_error(void *context);
void double_read(struct page_double *page);
int double_reply(void *context, const uint8_t *message, size_t len);

#endif
