#include "cold_read.h"

#include <stdlib.h>

void cold_read_init(struct cold_read *cold)
{
    *cold = (struct cold_read){ .state = COLD_READ_IDLE };
}

void cold_read_deinit(struct cold_read *cold)
{
    free(cold->buffer);
}

bool cold_read_is_pending(const struct cold_read *cold)
{
    int state = atomic_load_explicit(&cold->state, memory_order_acquire);

    return state == COLD_READ_WANTED || state == COLD_READ_READING;
}

static bool reserve(struct cold_read *cold, size_t len)
{
    if (cold->capacity >= len)
        return true;
    free(cold->buffer);
    cold->buffer = malloc(len);
    cold->capacity = cold->buffer ? len : 0;
    return cold->buffer != NULL;
}

bool cold_read_want(struct cold_read *cold, struct image *image, uint64_t offset, size_t len, uint64_t min_hole)
{
    if (!reserve(cold, len)) {
        atomic_store_explicit(&cold->state, COLD_READ_IDLE, memory_order_release);
        return false;
    }
    cold->image = image;
    cold->offset = offset;
    cold->len = len;
    cold->min_hole = min_hole;
    cold->hole_end = 0;
    atomic_store_explicit(&cold->state, COLD_READ_WANTED, memory_order_release);
    return true;
}

void cold_read_run(struct cold_read *cold)
{
    int wanted = COLD_READ_WANTED;
    int64_t data;

    if (!atomic_compare_exchange_strong(&cold->state, &wanted, COLD_READ_READING))
        return;
    data = image_next_data(cold->image, cold->offset);
    if (data < 0)
        cold->result = (ssize_t)data;
    else if ((uint64_t)data - cold->offset >= cold->min_hole)
        cold->hole_end = (uint64_t)data;
    else
        cold->result = image_read(cold->image, cold->buffer, cold->len, cold->offset, true);
    atomic_store_explicit(&cold->state, COLD_READ_READY, memory_order_release);
}

bool cold_read_has(const struct cold_read *cold, uint64_t offset)
{
    return atomic_load_explicit(&cold->state, memory_order_acquire) == COLD_READ_READY && cold->offset == offset;
}

void cold_read_take(struct cold_read *cold)
{
    atomic_store_explicit(&cold->state, COLD_READ_IDLE, memory_order_release);
}
