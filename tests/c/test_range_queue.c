// sources: range_queue.c
#include "range_queue.h"

#include <assert.h>

static uint64_t take(struct range_queue *queue)
{
    enum priority priority = range_queue_first(queue);
    uint64_t id = range_queue_head(queue, priority)->request_id;

    range_queue_pop(queue, priority);
    return id;
}

static void urgent_first_then_oldest(void)
{
    static const enum priority pushed[] = { PRIORITY_BULK,   PRIORITY_PREFETCH, PRIORITY_BULK,
                                            PRIORITY_DEMAND, PRIORITY_PREFETCH, PRIORITY_DEMAND };
    static const uint64_t expected[] = { 3, 5, 1, 4, 0, 2 };
    struct range_queue queue;

    range_queue_init(&queue, 8);
    for (unsigned i = 0; i < 6; i++)
        assert(range_queue_push(&queue, pushed[i], i, 0, 1));
    for (unsigned i = 0; i < 6; i++)
        assert(take(&queue) == expected[i]);
    assert(!range_queue_first(&queue));
    assert(range_queue_head(&queue, PRIORITY_DEMAND) == NULL);
    range_queue_deinit(&queue);
}

/* Through every growth of the array, order holds; and the bound is exact. */
static void grows_to_its_bound_and_no_further(void)
{
    enum { MAX = 1000 };
    struct range_queue queue;

    range_queue_init(&queue, MAX);
    for (uint64_t i = 0; i < MAX; i++)
        assert(range_queue_push(&queue, PRIORITY_BULK, i, i, i + 1));
    assert(!range_queue_push(&queue, PRIORITY_DEMAND, MAX, 0, 1));
    for (uint64_t i = 0; i < 5 * MAX; i++) {
        assert(take(&queue) == i);
        assert(range_queue_push(&queue, PRIORITY_BULK, MAX + i, 0, 1));
        assert(queue.count == MAX);
    }
    assert(queue.capacity == MAX);
    range_queue_deinit(&queue);
}

static void none_allowed(void)
{
    struct range_queue queue;

    range_queue_init(&queue, 0);
    assert(!range_queue_push(&queue, PRIORITY_DEMAND, 1, 0, 1));
    range_queue_deinit(&queue);
}

int main(void)
{
    urgent_first_then_oldest();
    grows_to_its_bound_and_no_further();
    none_allowed();
    return 0;
}
