/* The mappings of a RAM file: registered with its userfaultfd, and followed as the VMM moves and drops them.
 *
 * Until the hand-off nobody reads the userfaultfd, so an unmapping that the kernel would report must not happen while
 * the range is registered: it would wait for ever. It is unregistered first then. After the hand-off the kernel's
 * events tell the daemon, and the table here only says where the block still is.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "preload.h"

/* Newer than the oldest headers we build with (Linux 6.1, "userfaultfd: add /dev/userfaultfd"). */
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

#define EVENTS (UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_UNMAP)

/* The device needs the file's permission, the call CAP_SYS_PTRACE or vm.unprivileged_userfaultfd. userfaultfd(2). */
static int open_uffd(void)
{
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	int fd = -1;

	if (device >= 0) {
		fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
		close(device);
	}
	return fd >= 0 ? fd : (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
}

static int make_uffd(uint64_t memory_feature)
{
	struct uffdio_api api = { .api = UFFD_API, .features = EVENTS | UFFD_FEATURE_THREAD_ID | memory_feature };
	int fd = open_uffd();

	if (fd < 0)
		preload_fail("no userfaultfd: %s; allow /dev/userfaultfd, or give CAP_SYS_PTRACE, or set "
			     "vm.unprivileged_userfaultfd=1",
			     strerror(errno));
	if (ioctl(fd, UFFDIO_API, &api))
		preload_fail("this kernel's userfaultfd lacks what is needed (events, thread ids, missing pages of files): %s",
			     strerror(errno));
	return fd;
}

static void open_block(struct preload_block *block, int fd, const struct stat *file)
{
	struct statfs fs;

	if (fstatfs(fd, &fs))
		preload_fail("%s cannot be examined: %s", block->ram, strerror(errno));
	if (fs.f_type != TMPFS_MAGIC && fs.f_type != HUGETLBFS_MAGIC)
		preload_fail("%s lies on no memory file system: only files on tmpfs and hugetlbfs, and memfds, can be served",
			     block->ram);
	/* What is there already never faults: unless someone vouches for it, it is an older guest's memory. */
	if (file->st_blocks && !preload.present)
		preload_fail("%s holds data already; remove it first, or name in POSTCOPYD_PRESENT the bitmap of the pages "
			     "that are good, which `postcopyd prepare --present` gets too",
			     block->ram);
	block->page_size = (uint64_t)fs.f_bsize;
	if (preload.present)
		present_keep(block, fd, (uint64_t)file->st_size);
	block->device = file->st_dev;
	block->inode = file->st_ino;
	block->mapped = true;
	block->uffd = make_uffd(fs.f_type == HUGETLBFS_MAGIC ? UFFD_FEATURE_MISSING_HUGETLBFS :
							       UFFD_FEATURE_MISSING_SHMEM);
}

static void register_range(const struct preload_block *block, const struct preload_range *range)
{
	struct uffdio_register registration = { .range = { range->start, range->len },
						.mode = UFFDIO_REGISTER_MODE_MISSING };

	if (ioctl(block->uffd, UFFDIO_REGISTER, &registration))
		preload_fail("%s: %llu bytes at %#llx cannot be registered with the userfaultfd: %s", block->ram,
			     (unsigned long long)range->len, (unsigned long long)range->start, strerror(errno));
	/* A child that shares the file but not the userfaultfd would fill its holes with zeros, and those are the guest's. */
	if (madvise((void *)range->start, range->len, MADV_DONTFORK))
		preload_fail("%s cannot be kept from forked children: %s", block->ram, strerror(errno));
}

static void add_range(struct preload_block *block, struct preload_range range)
{
	if (block->ranges == PRELOAD_RANGES_MAX)
		preload_fail("%s is mapped in more than %d pieces", block->ram, PRELOAD_RANGES_MAX);
	block->range[block->ranges++] = range;
}

void block_mapped(struct preload_block *block, int fd, bool shared, struct preload_range range)
{
	struct stat file;

	if (fstat(fd, &file))
		preload_fail("%s cannot be examined: %s", block->ram, strerror(errno));
	if (!shared)
		preload_fail("%s is mapped privately; guest RAM must be shared (share=on)", block->ram);
	if (!block->mapped)
		open_block(block, fd, &file);
	if (block->uffd < 0)
		return; /* complete: an ordinary file by now */
	if (file.st_dev != block->device || file.st_ino != block->inode)
		preload_fail("two files match %s; name each, with a socket of its own", block->ram);
	if (block->handed_over)
		preload_fail("%s is mapped once more after its hand-off; start the VMM with POSTCOPYD_WAIT=1 before "
			     "`postcopyd prepare`",
			     block->ram);
	range.len = (range.len + block->page_size - 1) & ~(block->page_size - 1);
	for (size_t i = 0; i < block->ranges; i++) {
		const struct preload_range *other = &block->range[i];

		if (range.offset < other->offset + other->len && other->offset < range.offset + range.len)
			preload_fail("%s is mapped twice; a page can be given to one mapping only", block->ram);
	}
	register_range(block, &range);
	add_range(block, range);
}

/* Take [start, end) out of the table; what is left of a range on both sides stays. */
static void cut(struct preload_block *block, uint64_t start, uint64_t end)
{
	for (size_t i = block->ranges; i-- > 0;) {
		struct preload_range range = block->range[i];
		uint64_t range_end = range.start + range.len;

		if (end <= range.start || range_end <= start)
			continue;
		block->range[i] = block->range[--block->ranges];
		if (range.start < start)
			add_range(block, (struct preload_range){ range.start, start - range.start, range.offset });
		if (end < range_end)
			add_range(block, (struct preload_range){ end, range_end - end, range.offset + (end - range.start) });
	}
}

void block_unmapping(struct preload_block *block, uint64_t start, uint64_t len)
{
	uint64_t end = start + ((len + block->page_size - 1) & ~(block->page_size - 1));

	for (size_t i = 0; !block->handed_over && i < block->ranges; i++) {
		const struct preload_range *range = &block->range[i];
		uint64_t from = range->start > start ? range->start : start;
		uint64_t to = range->start + range->len < end ? range->start + range->len : end;
		struct uffdio_range part = { from, to - from };

		if (from >= to)
			continue;
		if (ioctl(block->uffd, UFFDIO_UNREGISTER, &part))
			preload_fail("%s cannot be unregistered: %s", block->ram, strerror(errno));
		/* Whom the kernel missed: docs/kernel-policy.md, "The end". */
		ioctl(block->uffd, UFFDIO_WAKE, &part);
	}
	cut(block, start, end);
}

static const struct preload_range *range_at(const struct preload_block *block, uint64_t address)
{
	for (size_t i = 0; i < block->ranges; i++) {
		if (address >= block->range[i].start && address - block->range[i].start < block->range[i].len)
			return &block->range[i];
	}
	return NULL;
}

bool block_has(const struct preload_block *block, uint64_t address)
{
	return range_at(block, address);
}

void block_moved(struct preload_block *block, uint64_t from, uint64_t old_len, uint64_t to, uint64_t new_len)
{
	const struct preload_range *range = range_at(block, from);
	struct preload_range moved;

	if (!range)
		return;
	if (new_len > old_len)
		preload_fail("%s grew by mremap; RAM that grows while it is absent cannot be served", block->ram);
	moved = (struct preload_range){ to, new_len, range->offset + (from - range->start) };
	cut(block, from, from + old_len);
	add_range(block, moved);
}
