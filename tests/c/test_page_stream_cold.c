// sources: page_stream.c cold_read.c range_queue.c server_wire.c file_epoch.c image.c image_catalog.c image_view.c zero.c checksum.c checksum_avx2.c
/* A page stream on a disk whose speed the test decides: it stands in for preadv2 and says which reads are cached. */
#define _GNU_SOURCE
#include "page_stream.h"

#include <assert.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "page_requests.h"

#define PAGE 4096u
#define MIB (1u << 20)

static uint64_t cached_from, cached_to;

ssize_t preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    size_t len = iov->iov_len;

    assert(count == 1 && flags == RWF_NOWAIT);
    if ((uint64_t)offset < cached_from || (uint64_t)offset >= cached_to) {
        errno = EAGAIN;
        return -1;
    }
    if (len > cached_to - (uint64_t)offset)
        len = cached_to - (uint64_t)offset;
    return pread(fd, iov->iov_base, len, offset);
}

struct bench {
    char path[64];
    struct image_catalog *catalog;
    struct image *image;
    void *stream;
    uint8_t *out;
    size_t cap;
};

static void ask(struct bench *b, uint64_t id, uint64_t offset, uint64_t length, unsigned priority)
{
    uint8_t message[PAGE_REQUEST_MAX];

    assert(ps_request(b->stream, message, range_request(message, id, offset, length, priority)) == 0);
}

static void open_stream(struct bench *b)
{
    uint8_t message[PAGE_REQUEST_MAX];

    assert(ps_request(b->stream, message, opening_request(message, image_epoch(b->image), MIB)) == 0);
}

static void bench_init(struct bench *b, size_t size)
{
    struct ps_limits limits = { .max_ranges = 64, .max_data_bytes = MIB, .max_range_bytes = 1ull << 40 };
    int error;
    int fd;

    /* Not on tmpfs: there preadv2 is not asked. */
    strcpy(b->path, "/var/tmp/test_page_stream_cold.XXXXXX");
    fd = mkstemp(b->path);
    assert(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    for (size_t at = 0; at < size && size <= 64 * MIB; at += PAGE)
        assert(pwrite(fd, "page", 4, (off_t)at) == 4);
    close(fd);
    b->image = image_open(b->path, 0, &error);
    assert(b->image && !image_in_memory(b->image));
    b->catalog = image_catalog_new();
    assert(image_catalog_add(b->catalog, "vm", 2, b->image));
    b->stream = ps_new(b->catalog, limits);
    b->cap = ps_message_max(b->stream);
    b->out = malloc(b->cap);
    cached_from = cached_to = 0;
    open_stream(b);
}

static void bench_deinit(struct bench *b)
{
    ps_free(b->stream);
    image_catalog_free(b->catalog);
    unlink(b->path);
    free(b->out);
}

static ssize_t produce(struct bench *b)
{
    return ps_produce(b->stream, b->out, b->cap);
}

static void a_cold_read_is_wanted_once_and_done_elsewhere(void)
{
    struct bench b;

    bench_init(&b, 4 * MIB);
    ask(&b, 1, 0, 2 * MIB, 3);
    assert(produce(&b) == PS_WOULD_BLOCK);
    assert(produce(&b) == 0);
    ps_read_blocking(b.stream);
    assert(produce(&b) > (ssize_t)MIB);
    assert(ps_answered(b.stream) == MIB);
    /* What was read is used up; calling again without need does nothing. */
    ps_read_blocking(b.stream);
    assert(produce(&b) == PS_WOULD_BLOCK);
    ps_read_blocking(b.stream);
    ps_read_blocking(b.stream);
    assert(produce(&b) > (ssize_t)MIB);
    assert(produce(&b) == 0 && ps_outstanding(b.stream) == 0);
    bench_deinit(&b);
}

static void a_warm_demand_overtakes_a_cold_bulk(void)
{
    struct bench b;

    bench_init(&b, 4 * MIB);
    cached_from = 3 * MIB;
    cached_to = 4 * MIB;
    ask(&b, 1, 0, MIB, 3);
    assert(produce(&b) == PS_WOULD_BLOCK);
    ask(&b, 2, 3 * MIB, PAGE, 1);
    assert(produce(&b) > (ssize_t)PAGE && ps_answered(b.stream) == PAGE);
    assert(produce(&b) == 0);
    ps_read_blocking(b.stream);
    assert(produce(&b) > (ssize_t)MIB && ps_answered(b.stream) == MIB + PAGE);
    bench_deinit(&b);
}

static void a_cold_demand_waits_for_one_read_at_most(void)
{
    struct bench b;

    bench_init(&b, 4 * MIB);
    ask(&b, 1, 0, MIB, 3);
    assert(produce(&b) == PS_WOULD_BLOCK);
    ask(&b, 2, 2 * MIB, PAGE, 1);
    assert(produce(&b) == 0);
    ps_read_blocking(b.stream);
    assert(produce(&b) == PS_WOULD_BLOCK);
    ps_read_blocking(b.stream);
    assert(produce(&b) > 0 && ps_answered(b.stream) == PAGE);
    bench_deinit(&b);
}

static void what_is_cached_goes_out_before_the_disk_is_waited_for(void)
{
    struct bench b;

    bench_init(&b, 4 * MIB);
    cached_to = 5 * PAGE + 100;
    ask(&b, 1, 0, MIB, 3);
    assert(produce(&b) > (ssize_t)(5 * PAGE) && ps_answered(b.stream) == 5 * PAGE);
    assert(produce(&b) == PS_WOULD_BLOCK);
    bench_deinit(&b);
}

static void a_hole_is_found_by_the_other_thread(void)
{
    struct bench b;

    bench_init(&b, (size_t)1 << 40);
    ask(&b, 1, 0, (uint64_t)1 << 40, 3);
    assert(produce(&b) == PS_WOULD_BLOCK);
    ps_read_blocking(b.stream);
    assert(produce(&b) > 0 && ps_answered(b.stream) == (uint64_t)1 << 40);
    assert(ps_outstanding(b.stream) == 0);
    bench_deinit(&b);
}

static void an_image_that_shrank_is_data_loss(void)
{
    struct bench b;

    bench_init(&b, 4 * MIB);
    ask(&b, 1, 2 * MIB, MIB, 3);
    assert(truncate(b.path, 2 * MIB + 100) == 0);
    assert(produce(&b) == PS_WOULD_BLOCK);
    ps_read_blocking(b.stream);
    assert(produce(&b) == -PS_DATA_LOSS);
    assert(strstr(ps_error(b.stream), "shorter"));
    assert(ps_answered(b.stream) == 0);
    bench_deinit(&b);
}

static void an_image_released_while_a_read_waits_is_not_found(void)
{
    struct bench b;

    bench_init(&b, MIB);
    ask(&b, 1, 0, MIB, 3);
    assert(produce(&b) == PS_WOULD_BLOCK);
    image_release(b.image);
    ps_read_blocking(b.stream);
    assert(produce(&b) == -PS_NOT_FOUND);
    bench_deinit(&b);
}

int main(void)
{
    a_cold_read_is_wanted_once_and_done_elsewhere();
    a_warm_demand_overtakes_a_cold_bulk();
    a_cold_demand_waits_for_one_read_at_most();
    what_is_cached_goes_out_before_the_disk_is_waited_for();
    a_hole_is_found_by_the_other_thread();
    an_image_that_shrank_is_data_loss();
    an_image_released_while_a_read_waits_is_not_found();
    return 0;
}
