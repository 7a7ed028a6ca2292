#define _GNU_SOURCE
#include "file_epoch.h"

#include <fcntl.h>
#include <stddef.h>
#include <sys/sysmacros.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

uint64_t file_epoch(const struct stat *st)
{
    const uint64_t identity[] = {
        st->st_dev,
        st->st_ino,
        (uint64_t)st->st_size,
        (uint64_t)st->st_mtim.tv_sec * 1000000000u + (uint64_t)st->st_mtim.tv_nsec,
    };
    uint64_t epoch = XXH3_64bits(identity, sizeof identity);

    return epoch ? epoch : 1;
}

uint64_t file_epoch_of(int fd)
{
    const unsigned wanted = STATX_TYPE | STATX_INO | STATX_SIZE | STATX_MTIME;
    struct statx found;
    struct stat st = { 0 };

    if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, wanted, &found) || (found.stx_mask & wanted) != wanted ||
        !S_ISREG(found.stx_mode))
        return 0;
    st.st_dev = makedev(found.stx_dev_major, found.stx_dev_minor);
    st.st_ino = found.stx_ino;
    st.st_size = (off_t)found.stx_size;
    st.st_mtim.tv_sec = found.stx_mtime.tv_sec;
    st.st_mtim.tv_nsec = found.stx_mtime.tv_nsec;
    return file_epoch(&st);
}
