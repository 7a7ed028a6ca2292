/* The hand-off message: docs/protocol.md, "framed". */
#ifndef LIBPOSTCOPY_MESSAGE_H
#define LIBPOSTCOPY_MESSAGE_H

#include "handle.h"

/* The daemon reads no longer message. */
#define MESSAGE_BYTES_MAX (64u << 10)

/* Write the message that hands `pc` over into fresh memory. 0, -ENOMEM or -EMSGSIZE. */
int message_build(const struct postcopy *pc, uint8_t **frame, size_t *len);

#endif
