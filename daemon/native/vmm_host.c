/* What a VMM needs of its host: mapped memory, and a userfaultfd. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vmm.h"

/* Linux 5.11 and 6.1; the values are ABI. */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef MAP_HUGE_2MB
#define MAP_HUGE_2MB (21 << 26)
#endif

static int flags_of(int kind)
{
	switch (kind) {
	case VMM_MAP_SHARED:
		return MAP_SHARED | MAP_ANONYMOUS;
	case VMM_MAP_FILE:
		return MAP_SHARED;
	case VMM_MAP_HUGETLB:
		return MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_HUGE_2MB;
	default:
		return MAP_PRIVATE | MAP_ANONYMOUS;
	}
}

static int map(uint64_t len_bytes, int protection, int flags, int fd, uint8_t **out)
{
	void *memory = mmap(NULL, len_bytes, protection, flags, fd, 0);

	if (memory == MAP_FAILED)
		return -errno;
	*out = memory;
	return 0;
}

int vmm_map(int kind, uint64_t len_bytes, int fd, uint8_t **out)
{
	/* MAP_NORESERVE not for huge pages: a missing one must be refused here, not end the VMM with SIGBUS later. */
	int flags = flags_of(kind) | (kind == VMM_MAP_HUGETLB ? 0 : MAP_NORESERVE);

	return map(len_bytes, PROT_READ | PROT_WRITE, flags, kind == VMM_MAP_FILE ? fd : -1, out);
}

int vmm_map_readonly(uint64_t len_bytes, int fd, uint8_t **out)
{
	return map(len_bytes, PROT_READ, MAP_SHARED, fd, out);
}

void vmm_unmap(uint8_t *memory, uint64_t len_bytes)
{
	munmap(memory, len_bytes);
}

int vmm_discard(int kind, uint8_t *memory, uint64_t len_bytes)
{
	/* On shared memory MADV_DONTNEED would drop the mapping only, and the old content would come back. */
	int advice = kind == VMM_MAP_SHARED || kind == VMM_MAP_FILE ? MADV_REMOVE : MADV_DONTNEED;

	return madvise(memory, len_bytes, advice) ? -errno : 0;
}

void vmm_read(const uint8_t *memory, uint64_t offset, uint8_t *out, uint64_t len_bytes)
{
	memcpy(out, memory + offset, len_bytes);
}

void vmm_write(uint8_t *memory, uint64_t offset, const uint8_t *data, uint64_t len_bytes)
{
	memcpy(memory + offset, data, len_bytes);
}

int vmm_userfaultfd(int user_mode_only)
{
	int flags = O_CLOEXEC | O_NONBLOCK | (user_mode_only ? UFFD_USER_MODE_ONLY : 0);
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	int uffd = -1;

	if (device >= 0) {
		uffd = ioctl(device, USERFAULTFD_IOC_NEW, (unsigned long)flags);
		close(device);
	}
	if (uffd < 0)
		uffd = (int)syscall(SYS_userfaultfd, flags);
	return uffd < 0 ? -errno : uffd;
}
