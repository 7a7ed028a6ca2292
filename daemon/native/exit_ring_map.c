/* exit_ring_map, exit_ring_quiet: the descriptors of an exit ring, which a stranger made. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/uio.h>

#include "exit_ring.h"

/* The largest ring there can be, with room for geometry that another version may choose. */
#define RING_BYTES_MAX (EXIT_RING_RESIDENCY_MAX / 8 + (64u << 20))

int exit_ring_map(int fd, void **mem, size_t *len)
{
	const int needed = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
	struct statfs fs;
	struct stat st;
	int seals;
	void *at;

	if (fstat(fd, &st) || !S_ISREG(st.st_mode) || fstatfs(fd, &fs) || fs.f_type != TMPFS_MAGIC)
		return EXIT_RING_NOT_MEMFD;
	seals = fcntl(fd, F_GET_SEALS);
	if (seals < 0)
		return EXIT_RING_NOT_MEMFD;
	if ((seals & needed) != needed)
		return EXIT_RING_NOT_SEALED;
	if (st.st_size < (off_t)sizeof(struct exit_ring_header) || (uint64_t)st.st_size > RING_BYTES_MAX)
		return EXIT_RING_TOO_SMALL;
	at = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
	if (at == MAP_FAILED)
		return errno == ENOMEM ? EXIT_RING_NO_MEMORY : EXIT_RING_NOT_MEMFD;
	*mem = at;
	*len = (size_t)st.st_size;
	return EXIT_RING_OK;
}

void exit_ring_unmap(void *mem, size_t len)
{
	munmap(mem, len);
}

bool exit_ring_quiet(int doorbell)
{
	uint64_t rings;
	struct iovec iov = { .iov_base = &rings, .iov_len = sizeof(rings) };
	ssize_t got;

	/* O_NONBLOCK belongs to the open file, which the VMM shares and could clear between poll and read; RWF_NOWAIT is ours
	 * alone. Source: readv(2), and eventfd_read in fs/eventfd.c, which heeds IOCB_NOWAIT. */
	got = preadv2(doorbell, &iov, 1, -1, RWF_NOWAIT);
	return got == sizeof(rings) || (got < 0 && (errno == EAGAIN || errno == EINTR));
}
