#include "urgency.h"

#include <sys/epoll.h>

bool urgency_is_pressing(intptr_t epoll)
{
    struct epoll_event event;

    return epoll >= 0 && epoll_wait((int)epoll, &event, 1, 0) > 0;
}
