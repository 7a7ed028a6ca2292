/* The ranges a stream has been asked for: first in, first out within a priority. Bounded. */
#ifndef POSTCOPYD_RANGE_QUEUE_H
#define POSTCOPYD_RANGE_QUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Values of postcopyd.v1.Priority. */
enum priority { PRIORITY_DEMAND = 1, PRIORITY_PREFETCH = 2, PRIORITY_BULK = 3 };
enum { PRIORITIES = 3 };

/* [offset, end) is what has not been answered yet. */
struct range {
    uint64_t request_id;
    uint64_t offset;
    uint64_t end;
    uint32_t next;
};

struct range_queue {
    struct range *ranges;
    uint32_t capacity;
    uint32_t max;
    uint32_t count;
    uint32_t free;
    struct {
        uint32_t head;
        uint32_t tail;
    } line[PRIORITIES];
};

void range_queue_init(struct range_queue *queue, uint32_t max);
void range_queue_deinit(struct range_queue *queue);

/* False: `max` ranges are outstanding, or memory is short. */
bool range_queue_push(struct range_queue *queue, enum priority priority, uint64_t request_id, uint64_t offset,
                      uint64_t end);

/* The most urgent priority that has a range; 0 when there is none. */
enum priority range_queue_first(const struct range_queue *queue);

/* The oldest range of a priority, or NULL. Valid until the next push or pop. */
struct range *range_queue_head(struct range_queue *queue, enum priority priority);
void range_queue_pop(struct range_queue *queue, enum priority priority);

#endif
