#define _GNU_SOURCE
#include "image.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "file_epoch.h"

#ifndef RAMFS_MAGIC
#define RAMFS_MAGIC 0x858458f6
#endif

struct image {
    int fd;
    struct image_view view;
    bool in_memory;
    bool has_holes;
    uint32_t page_size;
    uint64_t size;
    uint64_t epoch;
    /* Calls that use fd now, and one for not being released. Whoever brings it to zero closes fd. */
    _Atomic uint32_t users;
    _Atomic bool released;
    _Atomic uint64_t served_data;
    _Atomic uint64_t served_zero;
    _Atomic uint64_t served_messages;
};

static bool image_enter(struct image *image)
{
    uint32_t users = atomic_load(&image->users);

    while (users != 0)
        if (atomic_compare_exchange_weak(&image->users, &users, users + 1))
            return true;
    return false;
}

static void image_leave(struct image *image)
{
    if (atomic_fetch_sub(&image->users, 1) != 1)
        return;
    image_view_close(&image->view);
    close(image->fd);
}

static bool is_in_memory(int fd)
{
    struct statfs fs;

    if (fstatfs(fd, &fs))
        return false;
    switch ((uint32_t)fs.f_type) {
    case TMPFS_MAGIC:
    case HUGETLBFS_MAGIC:
    case RAMFS_MAGIC:
        return true;
    default:
        return false;
    }
}

static int check_file(const struct stat *st)
{
    if (!S_ISREG(st->st_mode))
        return IMAGE_NOT_A_FILE;
    if (st->st_size == 0)
        return IMAGE_EMPTY;
    return st->st_size % IMAGE_PAGE ? IMAGE_UNALIGNED : 0;
}

static void image_init(struct image *image, int fd, const struct stat *st, uint64_t epoch)
{
    image->fd = fd;
    image->in_memory = is_in_memory(fd);
    /*
     * On hugetlbfs st_blksize is the huge page size; elsewhere it is advice about I/O and says nothing
     * about pages.
     */
    image->page_size = image->in_memory && st->st_blksize > IMAGE_PAGE ? (uint32_t)st->st_blksize : IMAGE_PAGE;
    image->size = (uint64_t)st->st_size;
    image->epoch = epoch ? epoch : file_epoch(st);
    /* ENXIO: the file is one hole. EINVAL: the file system does not know. */
    image->has_holes = lseek(fd, 0, SEEK_DATA) >= 0 || errno == ENXIO;
    atomic_init(&image->users, 1);
    image_view_open(&image->view, fd, image->size);
}

struct image *image_open(const char *path, uint64_t epoch, int *error)
{
    struct image *image = NULL;
    struct stat st;
    /* O_NONBLOCK: the path of a FIFO must be refused, not waited for. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

    if (fd < 0) {
        *error = -errno;
        return NULL;
    }
    *error = fstat(fd, &st) ? -errno : check_file(&st);
    if (!*error && !(image = calloc(1, sizeof *image)))
        *error = -ENOMEM;
    if (*error) {
        close(fd);
        return NULL;
    }
    image_init(image, fd, &st, epoch);
    return image;
}

void image_release(struct image *image)
{
    if (!atomic_exchange(&image->released, true))
        image_leave(image);
}

void image_free(struct image *image)
{
    image_release(image);
    free(image);
}

uint64_t image_size(const struct image *image)
{
    return image->size;
}

uint64_t image_epoch(const struct image *image)
{
    return image->epoch;
}

uint32_t image_page_size(const struct image *image)
{
    return image->page_size;
}

bool image_in_memory(const struct image *image)
{
    return image->in_memory;
}

bool image_has_holes(const struct image *image)
{
    return image->has_holes;
}

bool image_is_released(const struct image *image)
{
    return atomic_load(&image->released);
}

static ssize_t read_all(int fd, uint8_t *out, size_t len, uint64_t offset)
{
    size_t done = 0;

    while (done < len) {
        ssize_t n = pread(fd, out + done, len - done, (off_t)(offset + done));
        if (n > 0)
            done += (size_t)n;
        else if (n == 0)
            return IMAGE_SHRANK;
        else if (errno != EINTR)
            return -errno;
    }
    return (ssize_t)done;
}

/*
 * Whatever is not a whole cached page is left to the waiting read: a file system without RWF_NOWAIT answers
 * EOPNOTSUPP, Linux 5.9 and 5.10 may answer 0 away from the end (preadv2(2), BUGS), and the end itself must
 * be told from both.
 */
static ssize_t read_cached(int fd, uint8_t *out, size_t len, uint64_t offset)
{
    struct iovec iov = { .iov_base = out, .iov_len = len };
    ssize_t n;

    do
        n = preadv2(fd, &iov, 1, (off_t)offset, RWF_NOWAIT);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return errno == EAGAIN || errno == EOPNOTSUPP || errno == ENOSYS ? IMAGE_WOULD_BLOCK : -errno;
    n -= n % IMAGE_PAGE;
    return n ? n : IMAGE_WOULD_BLOCK;
}

ssize_t image_read(struct image *image, void *out, size_t len, uint64_t offset, bool wait)
{
    ssize_t n;

    if (!image_enter(image))
        return IMAGE_RELEASED;
    n = wait || image->in_memory ? read_all(image->fd, out, len, offset) : read_cached(image->fd, out, len, offset);
    image_leave(image);
    return n;
}

bool image_look(struct image *image, uint64_t offset, size_t len, image_work_fn work, void *context)
{
    bool seen;

    if (!image_enter(image))
        return false;
    seen = image_view_use(&image->view, offset, len, work, context);
    image_leave(image);
    return seen;
}

/*
 * SEEK_DATA says ENXIO both for "only a hole follows" and for "beyond the end", so the size is looked at
 * afterwards.
 */
static int still_whole(const struct image *image)
{
    struct stat st;

    if (fstat(image->fd, &st))
        return -errno;
    return (uint64_t)st.st_size < image->size ? IMAGE_SHRANK : 0;
}

static int64_t seek_data(const struct image *image, uint64_t offset)
{
    off_t data = lseek(image->fd, (off_t)offset, SEEK_DATA);
    int error;

    if (data < 0 && errno != ENXIO)
        /* The file system does not know: all is data. */
        return (int64_t)offset;
    if (data >= 0 && (uint64_t)data / IMAGE_PAGE == offset / IMAGE_PAGE)
        return (int64_t)offset;
    error = still_whole(image);
    if (error)
        return error;
    if (data < 0 || (uint64_t)data > image->size)
        return (int64_t)image->size;
    return (int64_t)((uint64_t)data / IMAGE_PAGE * IMAGE_PAGE);
}

int64_t image_next_data(struct image *image, uint64_t offset)
{
    int64_t data;

    if (!image_enter(image))
        return IMAGE_RELEASED;
    data = image->has_holes ? seek_data(image, offset) : (int64_t)offset;
    image_leave(image);
    return data;
}

/*
 * End of the data in the page at `offset` and those after it, up to a whole page; the image's size when no
 * hole follows. Asked from the next page on: with file system blocks below 4 KiB the page itself may begin
 * with a hole.
 */
static uint64_t seek_hole(const struct image *image, uint64_t offset)
{
    off_t hole = lseek(image->fd, (off_t)(offset + IMAGE_PAGE), SEEK_HOLE);

    if (hole < 0 || (uint64_t)hole >= image->size)
        return image->size;
    return ((uint64_t)hole + IMAGE_PAGE - 1) / IMAGE_PAGE * IMAGE_PAGE;
}

static ssize_t collect_holes(const struct image *image, uint64_t *cursor, uint64_t *pairs, size_t max)
{
    size_t count = 0;

    while (count < max && *cursor < image->size) {
        int64_t data = seek_data(image, *cursor);
        if (data < 0)
            return data;
        if ((uint64_t)data > *cursor) {
            pairs[2 * count] = *cursor;
            pairs[2 * count + 1] = (uint64_t)data - *cursor;
            count++;
        }
        *cursor = (uint64_t)data < image->size ? seek_hole(image, (uint64_t)data) : image->size;
    }
    return (ssize_t)count;
}

ssize_t image_holes(struct image *image, uint64_t *cursor, uint64_t *pairs, size_t max)
{
    ssize_t count;

    if (!image_enter(image))
        return IMAGE_RELEASED;
    if (image->has_holes) {
        count = collect_holes(image, cursor, pairs, max);
    } else {
        *cursor = image->size;
        count = 0;
    }
    image_leave(image);
    return count;
}

void image_count(struct image *image, uint64_t data, uint64_t zero)
{
    atomic_fetch_add_explicit(&image->served_data, data, memory_order_relaxed);
    atomic_fetch_add_explicit(&image->served_zero, zero, memory_order_relaxed);
    atomic_fetch_add_explicit(&image->served_messages, 1, memory_order_relaxed);
}

struct image_served image_served(const struct image *image)
{
    return (struct image_served){
        .data = atomic_load_explicit(&image->served_data, memory_order_relaxed),
        .zero = atomic_load_explicit(&image->served_zero, memory_order_relaxed),
        .messages = atomic_load_explicit(&image->served_messages, memory_order_relaxed),
    };
}
