/* What tells one content of a file from another: the epoch of an image that was given none. */
#ifndef POSTCOPYD_FILE_EPOCH_H
#define POSTCOPYD_FILE_EPOCH_H

#include <stdint.h>
#include <sys/stat.h>

/* Of the file that `st` describes; never 0. The same on one host for the same file as long as nobody writes to it. */
uint64_t file_epoch(const struct stat *st);

/* Of an open file of somebody else's; 0 if it is no regular file, or nothing is known of it. Asks no server (FUSE, NFS), whose
 * answer might never come. */
uint64_t file_epoch_of(int fd);

#endif
