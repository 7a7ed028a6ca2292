#include "range_queue.h"

#include <stdlib.h>

/* Ranges lie in one array that grows, and are linked by index, so that growing moves them freely. */
#define NONE UINT32_MAX
#define INITIAL 64u

void range_queue_init(struct range_queue *queue, uint32_t max)
{
    *queue = (struct range_queue){ .max = max, .free = NONE };
    for (int i = 0; i < PRIORITIES; i++)
        queue->line[i].head = queue->line[i].tail = NONE;
}

void range_queue_deinit(struct range_queue *queue)
{
    free(queue->ranges);
}

static bool grow(struct range_queue *queue)
{
    uint32_t capacity = queue->capacity ? queue->capacity * 2 : INITIAL;
    struct range *ranges;

    if (capacity > queue->max)
        capacity = queue->max;
    ranges = realloc(queue->ranges, capacity * sizeof *ranges);
    if (!ranges)
        return false;
    for (uint32_t i = queue->capacity; i < capacity; i++) {
        ranges[i].next = queue->free;
        queue->free = i;
    }
    queue->ranges = ranges;
    queue->capacity = capacity;
    return true;
}

bool range_queue_push(struct range_queue *queue, enum priority priority, uint64_t request_id, uint64_t offset,
                      uint64_t end)
{
    uint32_t *tail = &queue->line[priority - 1].tail;
    uint32_t at;

    if (queue->count == queue->max || (queue->free == NONE && !grow(queue)))
        return false;
    at = queue->free;
    queue->free = queue->ranges[at].next;
    queue->ranges[at] = (struct range){ .request_id = request_id, .offset = offset, .end = end, .next = NONE };
    if (*tail == NONE)
        queue->line[priority - 1].head = at;
    else
        queue->ranges[*tail].next = at;
    *tail = at;
    queue->count++;
    return true;
}

enum priority range_queue_first(const struct range_queue *queue)
{
    for (int i = 0; i < PRIORITIES; i++)
        if (queue->line[i].head != NONE)
            return (enum priority)(i + 1);
    return 0;
}

struct range *range_queue_head(struct range_queue *queue, enum priority priority)
{
    uint32_t head = queue->line[priority - 1].head;

    return head == NONE ? NULL : &queue->ranges[head];
}

void range_queue_pop(struct range_queue *queue, enum priority priority)
{
    uint32_t *head = &queue->line[priority - 1].head;
    uint32_t at = *head;

    *head = queue->ranges[at].next;
    if (*head == NONE)
        queue->line[priority - 1].tail = NONE;
    queue->ranges[at].next = queue->free;
    queue->free = at;
    queue->count--;
}
