#define _GNU_SOURCE
#include "probe_kvm.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

static int real_open_kvm(void *context)
{
	(void)context;
	return open("/dev/kvm", O_RDWR | O_CLOEXEC);
}

static int real_ioctl(void *context, int fd, unsigned long request, uintptr_t arg)
{
	(void)context;
	return ioctl(fd, request, arg);
}

static void *real_map(void *context, int fd, size_t len)
{
	void *mem = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	(void)context;
	return mem == MAP_FAILED ? NULL : mem;
}

static void real_unmap(void *context, void *mem, size_t len)
{
	(void)context;
	munmap(mem, len);
}

static void real_close(void *context, int fd)
{
	(void)context;
	close(fd);
}

static int real_open_userfaultfd(void *context)
{
	(void)context;
	return (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
}

const struct postcopy_kvm_ops probe_real_kvm = {
	.open_kvm = real_open_kvm,
	.ioctl = real_ioctl,
	.map = real_map,
	.unmap = real_unmap,
	.close = real_close,
	.open_userfaultfd = real_open_userfaultfd,
};
