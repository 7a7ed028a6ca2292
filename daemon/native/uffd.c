#include "uffd.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* Newer than the oldest headers we build with (Linux 6.6, "mm: userfaultfd: add new UFFDIO_POISON ioctl"). */
#ifndef UFFDIO_POISON
struct uffdio_poison {
	struct uffdio_range range;
	__u64 mode;
	__s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif

_Static_assert(sizeof(struct uffd_msg) == 32, "uffd_msg layout");
_Static_assert(UFFDIO_POISON == 0xc020aa08, "UFFDIO_POISON number");

struct uffd_result uffd_classify(enum uffd_op op, int error, int64_t result, uint64_t len_bytes)
{
	struct uffd_result r = { .error = error };

	if (error == 0) {
		r.answer = UFFD_DONE;
		r.done_bytes = len_bytes;
		return r;
	}
	/* Any failure after a first page reports that prefix: it is installed and its waiters are awake. */
	if (result > 0 && (uint64_t)result < len_bytes) {
		r.answer = UFFD_PART;
		r.done_bytes = (uint64_t)result;
		return r;
	}
	switch (error) {
	case EEXIST:
		r.answer = UFFD_THERE;
		break;
	case EAGAIN:
		r.answer = UFFD_AGAIN;
		break;
	case ENOENT:
		r.answer = UFFD_UNMAPPED;
		break;
	case ESRCH:
		r.answer = UFFD_PROCESS_GONE;
		break;
	case ENOMEM:
	case ENOSPC:
		r.answer = UFFD_NO_MEMORY;
		break;
	case EFAULT:
		r.answer = op == UFFD_OP_CONTINUE ? UFFD_NO_PAGE : UFFD_UNEXPECTED;
		break;
	default:
		r.answer = UFFD_UNEXPECTED;
	}
	return r;
}

static struct uffd_result kernel_install(int fd, enum uffd_op op, uint64_t dst, uint64_t src, uint64_t len_bytes)
{
	struct uffdio_range range = { .start = dst, .len = len_bytes };
	int64_t result = 0;
	int failed = -1;

	errno = EINVAL;
	switch (op) {
	case UFFD_OP_COPY: {
		struct uffdio_copy copy = { .dst = dst, .src = src, .len = len_bytes };

		failed = ioctl(fd, UFFDIO_COPY, &copy);
		result = copy.copy;
		break;
	}
	case UFFD_OP_ZEROPAGE: {
		struct uffdio_zeropage zero = { .range = range };

		failed = ioctl(fd, UFFDIO_ZEROPAGE, &zero);
		result = zero.zeropage;
		break;
	}
	case UFFD_OP_CONTINUE: {
		struct uffdio_continue cont = { .range = range };

		failed = ioctl(fd, UFFDIO_CONTINUE, &cont);
		result = cont.mapped;
		break;
	}
	case UFFD_OP_POISON: {
		struct uffdio_poison poison = { .range = range };

		failed = ioctl(fd, UFFDIO_POISON, &poison);
		result = poison.updated;
		break;
	}
	case UFFD_OPS:
		break;
	}
	return uffd_classify(op, failed ? errno : 0, result, len_bytes);
}

static int kernel_wake(int fd, uint64_t start, uint64_t len_bytes)
{
	struct uffdio_range range = { .start = start, .len = len_bytes };

	return ioctl(fd, UFFDIO_WAKE, &range) ? errno : 0;
}

static int kernel_unprotect(int fd, uint64_t start, uint64_t len_bytes)
{
	struct uffdio_writeprotect wp = { .range = { .start = start, .len = len_bytes } };

	return ioctl(fd, UFFDIO_WRITEPROTECT, &wp) ? errno : 0;
}

/* The kernel wakes who waits, and unregisters then. A thread that faults in between, under the lock of its mapping alone
 * ("mm: handle userfaults under VMA lock", Linux 6.6), begins to wait for an answer to a message that nobody will read:
 * docs/kernel-policy.md, "The end". Afterwards no such fault can begin, so one more wake frees them all. */
static int kernel_unregister(int fd, uint64_t start, uint64_t len_bytes)
{
	struct uffdio_range range = { .start = start, .len = len_bytes };
	int error = ioctl(fd, UFFDIO_UNREGISTER, &range) ? errno : 0;

	kernel_wake(fd, start, len_bytes);
	return error;
}

static ssize_t kernel_read(int fd, struct uffd_msg *messages, size_t len_bytes)
{
	ssize_t n = read(fd, messages, len_bytes);

	return n < 0 ? -errno : n;
}

/* A mapping is refused if its pages cannot be promised; none is touched. */
static bool kernel_has_huge_page(uint64_t page_bytes)
{
	int shift = __builtin_ctzll(page_bytes);
	void *page = mmap(NULL, page_bytes, PROT_NONE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | shift << MAP_HUGE_SHIFT, -1, 0);

	if (page == MAP_FAILED)
		return false;
	munmap(page, page_bytes);
	return true;
}

/* What COPY says to one that gets as far as the destination's checks and then fails: it changes nothing. Negative errno: it was
 * not asked, for want of memory of our own. */
static int probe(int fd, uint64_t start, uint64_t len_bytes)
{
	void *unreadable = mmap(NULL, len_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	struct uffdio_copy copy = { .dst = start, .src = (uintptr_t)unreadable, .len = len_bytes };
	int error;

	if (unreadable == MAP_FAILED)
		return -errno;
	error = ioctl(fd, UFFDIO_COPY, &copy) ? errno : EINVAL;
	munmap(unreadable, len_bytes);
	return error;
}

/* Looked at before anything else, so also where nothing is registered any more (userfaultfd_copy in fs/userfaultfd.c). What could
 * not be asked may be changing: it is asked again. */
static bool kernel_is_changing(int fd, uint64_t start, uint64_t len_bytes)
{
	int error = probe(fd, start, len_bytes);

	return error == EAGAIN || error < 0;
}

const struct uffd_edge uffd_kernel = {
	.install = kernel_install,
	.wake = kernel_wake,
	.unprotect = kernel_unprotect,
	.unregister = kernel_unregister,
	.read = kernel_read,
	.has_huge_page = kernel_has_huge_page,
	.is_changing = kernel_is_changing,
};

int uffd_probe_registered(int fd, uint64_t start, uint64_t len_bytes)
{
	int error = probe(fd, start, len_bytes);

	if (error < 0)
		return error;
	switch (error) {
	case EFAULT:
	case EEXIST:
	case EAGAIN:
	case ENOMEM: /* hugetlbfs looks for a free page, after the mapping and before the source */
	case ENOSPC:
		return 1;
	case ENOENT:
		return 0;
	default:
		return -error;
	}
}
