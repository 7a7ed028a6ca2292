#define _GNU_SOURCE
#include "image_view.h"

#include <linux/magic.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { PAGE = 4096, LOOK_PAGES = 64 };

/* Where this thread goes on when the memory that it looks at is no more. */
static _Thread_local sigjmp_buf *landing;

static struct sigaction others;
static bool is_caught;

static void on_bus(int number, siginfo_t *info, void *context)
{
    if (landing && info->si_code > 0)
        siglongjmp(*landing, 1);
    /* Not ours: as if we were not here. */
    if (others.sa_flags & SA_SIGINFO) {
        others.sa_sigaction(number, info, context);
    } else if (others.sa_handler != SIG_DFL && others.sa_handler != SIG_IGN) {
        others.sa_handler(number);
    } else {
        /* What caused it is done again behind this, unless it was sent. */
        (void)sigaction(number, &others, NULL);
        if (info->si_code <= 0)
            (void)raise(number);
    }
}

static void catch_bus(void)
{
    struct sigaction action = { .sa_sigaction = on_bus, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK };

    sigemptyset(&action.sa_mask);
    is_caught = sigaction(SIGBUS, &action, &others) == 0;
}

/*
 * hugetlbfs knows only of what is mapped already, and a mapping of it takes huge pages away. Who does not own a file is told that
 * all of it is in memory (can_do_mincore in mm/mincore.c).
 */
static bool can_be_asked(int fd)
{
    struct statfs fs;
    struct stat st;

    return fstatfs(fd, &fs) == 0 && (uint32_t)fs.f_type == TMPFS_MAGIC && fstat(fd, &st) == 0 &&
           (geteuid() == 0 || st.st_uid == geteuid());
}

void image_view_open(struct image_view *view, int fd, uint64_t len_bytes)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    void *start;

    *view = (struct image_view){ 0 };
    (void)pthread_once(&once, catch_bus);
    if (!is_caught || !can_be_asked(fd))
        return;
    start = mmap(NULL, len_bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (start == MAP_FAILED)
        return;
    (void)madvise(start, len_bytes, MADV_DONTDUMP);
    *view = (struct image_view){ .start = start, .len_bytes = len_bytes };
}

void image_view_close(struct image_view *view)
{
    if (view->start)
        munmap((void *)(uintptr_t)view->start, view->len_bytes);
    *view = (struct image_view){ 0 };
}

static bool is_resident(const uint8_t *at, size_t len)
{
    unsigned char in[LOOK_PAGES];

    for (size_t part; len; at += part, len -= part) {
        part = len < LOOK_PAGES * PAGE ? len : LOOK_PAGES * PAGE;
        if (mincore((void *)(uintptr_t)at, part, in))
            return false;
        for (size_t page = 0; page < part / PAGE; page++)
            if (!(in[page] & 1))
                return false;
    }
    return true;
}

bool image_view_use(const struct image_view *view, uint64_t offset, size_t len, image_work_fn work, void *context)
{
    sigjmp_buf here;

    if (!view->start || offset > view->len_bytes || len > view->len_bytes - offset ||
        !is_resident(view->start + offset, len))
        return false;
    /* The mask need not be saved: the signal does not block itself. */
    if (sigsetjmp(here, 0)) {
        landing = NULL;
        return false;
    }
    landing = &here;
    work(context, view->start + offset);
    landing = NULL;
    return true;
}
