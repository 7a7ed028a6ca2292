/* Whether somebody waits for what the event loop has not looked at yet: see postcopyd/urgency.py. */
#ifndef POSTCOPYD_URGENCY_H
#define POSTCOPYD_URGENCY_H

#include <stdbool.h>
#include <stdint.h>

/* epoll: the descriptor of an epoll instance that is readable while somebody does; -1: nobody ever does. */
bool urgency_is_pressing(intptr_t epoll);

#endif
