struct image;
struct image_catalog;

struct image_served {
    uint64_t data;
    uint64_t zero;
    uint64_t messages;
};

struct ps_limits {
    uint32_t max_ranges;
    uint32_t max_data_bytes;
    uint64_t max_range_bytes;
};

#define PS_WOULD_BLOCK ...
#define PS_RUN_ALIGN_MAX ...
#define PS_REQUEST_MAX ...
#define PS_MESSAGE_OVERHEAD ...
static const int IMAGE_SHRANK;
static const int IMAGE_RELEASED;
static const int IMAGE_NOT_A_FILE;
static const int IMAGE_EMPTY;
static const int IMAGE_UNALIGNED;

struct image *image_open(const char *path, uint64_t epoch, int *error);
void image_release(struct image *image);
void image_free(struct image *image);
uint64_t image_size(const struct image *image);
uint64_t image_epoch(const struct image *image);
uint32_t image_page_size(const struct image *image);
bool image_in_memory(const struct image *image);
bool image_has_holes(const struct image *image);
bool image_is_released(const struct image *image);
ssize_t image_holes(struct image *image, uint64_t *cursor, uint64_t *pairs, size_t max);
struct image_served image_served(const struct image *image);

struct image_catalog *image_catalog_new(void);
void image_catalog_free(struct image_catalog *catalog);
bool image_catalog_add(struct image_catalog *catalog, const char *id, size_t id_len, struct image *image);

void *ps_new(const struct image_catalog *catalog, struct ps_limits limits);
void ps_free(void *stream);
void ps_refuse(void *stream, int status, const char *message);
int ps_request(void *stream, const uint8_t *message, size_t len);
ssize_t ps_produce(void *stream, uint8_t *out, size_t cap);
void ps_read_blocking(void *stream);
const char *ps_error(void *stream);
size_t ps_message_max(void *stream);
uint32_t ps_outstanding(void *stream);
uint64_t ps_answered(void *stream);
