/* For cffi; the compiler checks it against h2.h. */
struct h2_conn;
typedef int (*h2_message_fn)(void *context, const uint8_t *message, size_t len);
typedef ssize_t (*h2_produce_fn)(void *context, uint8_t *out, size_t cap);
typedef const char *(*h2_error_fn)(void *context);
typedef int (*h2_open_fn)(void *user, int32_t stream_id, const char *path, int64_t timeout_ms);
struct h2_limits {
    uint32_t max_message_bytes;
    uint32_t max_produced_bytes;
    uint32_t max_queued_bytes;
    uint32_t max_streams;
    uint32_t window_bytes;
    uint32_t max_frame_bytes;
    uint32_t max_header_bytes;
    uint32_t slice_bytes;
    uint32_t piece_bytes;
    uint32_t control_burst;
    uint32_t control_rate;
    uint32_t reset_burst;
    uint32_t reset_rate;
};
struct h2_config {
    int is_server;
    struct h2_limits limits;
    h2_open_fn open;
    void *user;
};
enum h2_event_kind {
    H2_MESSAGE = 1,
    H2_ENDED = 2,
    H2_STALLED = 3,
    H2_DRAINED = 4,
    H2_GOAWAY = 5,
};
enum h2_origin {
    H2_BY_STATUS = 1,
    H2_BY_RESET = 2,
    H2_BY_PROTOCOL = 3,
    H2_BY_SINK = 4,
    H2_BY_OWNER = 5,
};
struct h2_event {
    int32_t kind;
    int32_t stream_id;
    int32_t status;
    int32_t origin;
    uint32_t len;
    uint8_t *data;
};
enum h2_attention_bit {
    H2_HAS_EVENTS = 1,
    H2_HAS_MORE = 2,
    H2_IS_OVER = 4,
};
struct h2_stats {
    uint64_t messages_in;
    uint64_t messages_out;
    uint64_t bytes_in;
    uint64_t bytes_out;
    uint64_t frames_in_place;
    uint64_t queued_bytes;
    uint64_t queued_peak;
    uint32_t streams;
};
struct h2_conn *h2_new(const struct h2_config *config);
void h2_free(struct h2_conn *conn);
int h2_feed(struct h2_conn *conn, const uint8_t *data, size_t len, double now_s);
typedef bool (*h2_pressing_fn)(intptr_t context);
int64_t h2_feed_background(struct h2_conn *conn, const uint8_t *data, h2_pressing_fn pressing, intptr_t context,
                           size_t begin, size_t end, double now_s, bool look_first);
ssize_t h2_fill(struct h2_conn *conn, uint8_t *out, size_t cap);
size_t h2_block_bytes(const struct h2_conn *conn);
const uint32_t *h2_attention(const struct h2_conn *conn);
int h2_next_event(struct h2_conn *conn, struct h2_event *event);
const char *h2_error(const struct h2_conn *conn);
const struct h2_stats *h2_statistics(const struct h2_conn *conn);
int h2_ping(struct h2_conn *conn);
int h2_shutdown(struct h2_conn *conn);
int32_t h2_call(struct h2_conn *conn, const char *path, const char *authority, const char *scheme, int64_t timeout_ms,
                uintptr_t sink, uintptr_t context);
int h2_send(struct h2_conn *conn, int32_t stream_id, const uint8_t *message, size_t len);
int h2_half_close(struct h2_conn *conn, int32_t stream_id);
int h2_consumed(struct h2_conn *conn, int32_t stream_id, uint32_t len);
int h2_reset(struct h2_conn *conn, int32_t stream_id, uint32_t http2_error);
int h2_serve_pages(struct h2_conn *conn, int32_t stream_id, uintptr_t context, uintptr_t request, uintptr_t produce,
                   uintptr_t error);
int h2_serve_handler(struct h2_conn *conn, int32_t stream_id);
int h2_resume(struct h2_conn *conn, int32_t stream_id);
int h2_finish(struct h2_conn *conn, int32_t stream_id, int status, const char *message);
bool urgency_is_pressing(intptr_t epoll);
extern "Python" int h2_py_open(void *user, int32_t stream_id, const char *path, int64_t timeout_ms);
