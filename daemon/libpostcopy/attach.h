/* Handing over: a connection to the daemon, the message, its acknowledgement. */
#ifndef LIBPOSTCOPY_ATTACH_H
#define LIBPOSTCOPY_ATTACH_H

#include "handle.h"

/* Connect, send pc->frame with the descriptors and wait for the acknowledgement; the socket on success, else -errno. */
int attach_daemon(const struct postcopy *pc);

#endif
