/* What the owner is to decide, in order. */
#include <stdlib.h>
#include <string.h>

#include "h2_private.h"

/* A slice of input holds fewer messages than this: the owner takes all events after each. */
enum { EVENTS_MAX = 1 << 17, EVENTS_AT_FIRST = 16 };

static int make_room(struct h2_events *events) {
    if (events->first + events->count < events->cap)
        return 0;
    if (events->first) {
        memmove(events->items, events->items + events->first, events->count * sizeof *events->items);
        events->first = 0;
        return 0;
    }
    size_t cap = events->cap ? events->cap * 2 : EVENTS_AT_FIRST;
    struct h2_event *items = cap > EVENTS_MAX ? NULL : realloc(events->items, cap * sizeof *items);
    if (!items)
        return -1;
    events->items = items;
    events->cap = cap;
    return 0;
}

int h2_push_event(struct h2_conn *conn, struct h2_event event) {
    struct h2_events *events = &conn->events;
    uint8_t *copy = NULL;
    if (event.len && !(copy = malloc(event.len)))
        return h2_break(conn, "out of memory");
    if (copy)
        memcpy(copy, event.data, event.len);
    event.data = copy;
    if (make_room(events)) {
        free(copy);
        return h2_break(conn, "more events than the owner takes");
    }
    events->items[events->first + events->count++] = event;
    return 0;
}

int h2_next_event(struct h2_conn *conn, struct h2_event *event) {
    struct h2_events *events = &conn->events;
    free(events->given);
    events->given = NULL;
    if (!events->count) {
        h2_update_attention(conn);
        return 0;
    }
    *event = events->items[events->first++];
    events->given = event->data;
    if (!--events->count)
        events->first = 0;
    return 1;
}

void h2_events_deinit(struct h2_events *events) {
    for (size_t i = 0; i < events->count; i++)
        free(events->items[events->first + i].data);
    free(events->items);
    free(events->given);
    memset(events, 0, sizeof *events);
}
