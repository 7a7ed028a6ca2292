// sources: image_view.c
/* A view of real files: what is there is seen, nothing is filled, and a file that vanishes under it harms nobody. */
#define _GNU_SOURCE
#include "image_view.h"

#include <assert.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 200 };

struct seen {
    int fd;         /* cut while it is looked at; -1: not */
    size_t len;
    unsigned calls;
    uint64_t sum;
};

static void add_up(void *context, const uint8_t *bytes)
{
    struct seen *seen = context;

    seen->calls++;
    if (seen->fd >= 0)
        assert(ftruncate(seen->fd, PAGE) == 0);
    for (size_t i = 0; i < seen->len; i++)
        seen->sum += ((volatile const uint8_t *)bytes)[i];
}

/* Pages [first, first + count) hold their number + 1 in every byte; the rest is a hole. */
static int file_with(size_t first, size_t count)
{
    int fd = memfd_create("image", 0);
    uint8_t page[PAGE];

    assert(fd >= 0 && ftruncate(fd, PAGES * PAGE) == 0);
    for (size_t i = first; i < first + count; i++) {
        memset(page, (int)(i + 1), PAGE);
        assert(pwrite(fd, page, PAGE, (off_t)(i * PAGE)) == PAGE);
    }
    return fd;
}

static blkcnt_t blocks_of(int fd)
{
    struct stat st;

    assert(fstat(fd, &st) == 0);
    return st.st_blocks;
}

static void what_is_in_memory_is_seen(void)
{
    int fd = file_with(0, PAGES);
    struct image_view view;
    struct seen seen = { .fd = -1, .len = PAGES * PAGE };
    uint64_t wanted = 0;

    for (size_t i = 0; i < PAGES; i++)
        wanted += (uint64_t)(uint8_t)(i + 1) * PAGE;
    image_view_open(&view, fd, PAGES * PAGE);
    assert(view.start);
    assert(image_view_use(&view, 0, PAGES * PAGE, add_up, &seen) && seen.sum == wanted);
    seen = (struct seen){ .fd = -1, .len = PAGE };
    assert(image_view_use(&view, 7 * PAGE, PAGE, add_up, &seen) && seen.sum == 8 * PAGE);
    assert(!image_view_use(&view, (PAGES - 1) * PAGE, 2 * PAGE, add_up, &seen));
    assert(!image_view_use(&view, UINT64_MAX - PAGE + 1, 2 * PAGE, add_up, &seen));
    assert(!image_view_use(&view, (uint64_t)PAGES * PAGE, PAGE, add_up, &seen) && seen.calls == 1);
    image_view_close(&view);
    assert(!image_view_use(&view, 0, PAGE, add_up, &seen));
    close(fd);
}

static void a_hole_is_neither_seen_nor_filled(void)
{
    int fd = file_with(100, 50);
    blkcnt_t before = blocks_of(fd);
    struct image_view view;
    struct seen seen = { .fd = -1, .len = PAGE };

    image_view_open(&view, fd, PAGES * PAGE);
    assert(!image_view_use(&view, 0, PAGE, add_up, &seen));
    assert(!image_view_use(&view, 0, PAGES * PAGE, add_up, &seen));
    assert(!image_view_use(&view, 99 * PAGE, 2 * PAGE, add_up, &seen));
    /* The last of more pages than are asked for at once. */
    assert(!image_view_use(&view, 100 * PAGE, 51 * PAGE, add_up, &seen));
    assert(seen.calls == 0 && blocks_of(fd) == before);
    seen.len = 50 * PAGE;
    assert(image_view_use(&view, 100 * PAGE, 50 * PAGE, add_up, &seen) && seen.calls == 1);
    assert(blocks_of(fd) == before);
    image_view_close(&view);
    close(fd);
}

static void a_file_that_becomes_shorter_is_survived(void)
{
    int fd = file_with(0, PAGES);
    struct image_view view;
    struct seen seen = { .fd = fd, .len = PAGES * PAGE };

    image_view_open(&view, fd, PAGES * PAGE);
    assert(!image_view_use(&view, 0, PAGES * PAGE, add_up, &seen) && seen.calls == 1);
    seen = (struct seen){ .fd = -1, .len = PAGE };
    assert(!image_view_use(&view, PAGE, PAGE, add_up, &seen) && seen.calls == 0);
    assert(image_view_use(&view, 0, PAGE, add_up, &seen) && seen.sum == PAGE);
    image_view_close(&view);
    close(fd);
}

static void only_files_in_memory_are_viewed(void)
{
    char path[] = "/var/tmp/test_image_view.XXXXXX";
    int fd = mkstemp(path);
    struct image_view view;

    assert(fd >= 0 && ftruncate(fd, PAGES * PAGE) == 0);
    image_view_open(&view, fd, PAGES * PAGE);
    assert(!view.start);
    unlink(path);
    close(fd);
}

static sigjmp_buf elsewhere;
static volatile sig_atomic_t others_got;

static void others(int number)
{
    others_got = number;
    siglongjmp(elsewhere, 1);
}

/* A SIGBUS that is none of ours goes to whoever had it before. */
static void the_signal_of_others_stays_theirs(void)
{
    int fd = file_with(0, PAGES);
    volatile uint8_t *memory = mmap(NULL, PAGES * PAGE, PROT_READ, MAP_SHARED, fd, 0);

    assert(memory != MAP_FAILED && ftruncate(fd, 0) == 0);
    if (sigsetjmp(elsewhere, 1) == 0) {
        (void)memory[PAGE];
        abort();
    }
    assert(others_got == SIGBUS);
    others_got = 0;
    if (sigsetjmp(elsewhere, 1) == 0) {
        raise(SIGBUS);
        abort();
    }
    assert(others_got == SIGBUS);
    munmap((void *)(uintptr_t)memory, PAGES * PAGE);
    close(fd);
}

int main(void)
{
    struct sigaction action = { .sa_handler = others };

    assert(sigaction(SIGBUS, &action, NULL) == 0);
    what_is_in_memory_is_seen();
    a_hole_is_neither_seen_nor_filled();
    a_file_that_becomes_shorter_is_survived();
    only_files_in_memory_are_viewed();
    the_signal_of_others_stays_theirs();
    return 0;
}
