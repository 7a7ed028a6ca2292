/*
 * gRPC's message framing on the way in: one flag byte, four bytes of length (big endian), the message. A message that
 * lies whole in a chunk is given in place; another is put together with one copy.
 */
#ifndef POSTCOPYD_H2_ASSEMBLER_H
#define POSTCOPYD_H2_ASSEMBLER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { H2_PREFIX_BYTES = 5 };

struct h2_assembler {
    uint8_t prefix[H2_PREFIX_BYTES];
    uint8_t prefix_len;
    uint32_t need; /* length of the message at hand */
    uint32_t have;
    uint32_t cap; /* of `message` */
    uint8_t *message;
};

enum h2_assembled {
    H2_ASSEMBLED = 0,
    H2_TOO_LARGE,
    H2_COMPRESSED,
    H2_BAD_FLAG,
    H2_NO_MEMORY,
    H2_STOPPED, /* `take` returned nonzero */
};

/* Returns 0 to go on. */
typedef int (*h2_take_fn)(void *context, const uint8_t *message, size_t len);

enum h2_assembled h2_assemble(struct h2_assembler *assembler, const uint8_t *data, size_t len, uint32_t max_bytes,
                              h2_take_fn take, void *context);
/* Part of a message is here. */
bool h2_assembler_is_midway(const struct h2_assembler *assembler);
void h2_assembler_deinit(struct h2_assembler *assembler);
void h2_prefix_put(uint8_t *out, size_t len);

#endif
