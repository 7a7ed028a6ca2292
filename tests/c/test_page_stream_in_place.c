// sources: page_stream.c cold_read.c range_queue.c server_wire.c file_epoch.c image.c image_catalog.c zero.c checksum.c checksum_avx2.c
/* A page stream whose view of its image is lost in the middle: this stands in for image_view.c and says when. */
#define _GNU_SOURCE
#include "page_stream.h"

#include <assert.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "page_requests.h"

#define PAGE 4096u
#define HOLE (64u << 10)
#define ZEROS (16u << 10)
#define DATA (16u << 10)
#define SIZE (HOLE + ZEROS + DATA)

static uint8_t content[SIZE];
/* The view is lost behind the next look; the file has so many bytes then. */
static bool is_lost;
static size_t left;
static unsigned looks;
static int file;

void image_view_open(struct image_view *view, int fd, uint64_t len_bytes)
{
    (void)fd;
    *view = (struct image_view){ .start = content, .len_bytes = len_bytes };
}

void image_view_close(struct image_view *view)
{
    *view = (struct image_view){ 0 };
}

bool image_view_use(const struct image_view *view, uint64_t offset, size_t len, image_work_fn work, void *context)
{
    assert(offset + len <= view->len_bytes);
    looks++;
    work(context, view->start + offset);
    if (is_lost)
        assert(ftruncate(file, (off_t)left) == 0);
    return !is_lost;
}

/* The answers to one range from 0 on. Returns the first outcome that is no message. */
static ssize_t answers(uint64_t length, uint8_t *out, size_t cap, size_t *len)
{
    struct ps_limits limits = { .max_ranges = 4, .max_data_bytes = 1u << 20, .max_range_bytes = 1ull << 40 };
    struct image_catalog *catalog = image_catalog_new();
    uint8_t message[PAGE_REQUEST_MAX];
    char path[] = "/dev/shm/test_page_stream_in_place.XXXXXX";
    struct image *image;
    void *stream;
    ssize_t n;
    int error;

    file = mkstemp(path);
    assert(file >= 0 && ftruncate(file, SIZE) == 0);
    assert(pwrite(file, content + HOLE, ZEROS + DATA, HOLE) == ZEROS + DATA);
    image = image_open(path, 7, &error);
    assert(image && image_catalog_add(catalog, "vm", 2, image));
    stream = ps_new(catalog, limits);
    assert(ps_request(stream, message, opening_request(message, 7, 1u << 20)) == 0);
    assert(ps_request(stream, message, range_request(message, 1, 0, length, 3)) == 0);
    looks = 0;
    for (*len = 0; (n = ps_produce(stream, out + *len, cap - *len)) > 0; *len += (size_t)n)
        ;
    ps_free(stream);
    image_catalog_free(catalog);
    unlink(path);
    close(file);
    return n;
}

int main(void)
{
    static uint8_t wanted[4u << 20], got[4u << 20];
    size_t wanted_len, got_len;

    memset(content + HOLE + ZEROS, 0x5a, DATA);
    assert(answers(SIZE, wanted, sizeof wanted, &wanted_len) == 0 && looks == 1);
    assert(wanted_len > DATA && wanted_len < DATA + 200);

    /* Lost after all had been written, and the zeros joined to the hole before them: the file is read instead. */
    is_lost = true;
    left = SIZE;
    assert(answers(SIZE, got, sizeof got, &got_len) == 0 && looks == 1);
    assert(got_len == wanted_len && memcmp(got, wanted, got_len) == 0);

    /* The file cannot be read either: the hole was told, and nothing is said of what lies behind it. */
    assert(answers(HOLE, wanted, sizeof wanted, &wanted_len) == 0);
    left = HOLE + PAGE;
    assert(answers(SIZE, got, sizeof got, &got_len) == -PS_DATA_LOSS && looks == 2);
    assert(got_len == wanted_len && memcmp(got, wanted, got_len) == 0);
    return 0;
}
