/* The kernel's userfaultfd operations, and the one place that says what their answers mean. */
#ifndef POSTCOPY_UFFD_H
#define POSTCOPY_UFFD_H

#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum uffd_op {
	UFFD_OP_COPY = 0,
	UFFD_OP_ZEROPAGE = 1,
	UFFD_OP_CONTINUE = 2,
	UFFD_OP_POISON = 3,
	UFFD_OPS = 4,
};

enum uffd_answer {
	UFFD_DONE = 0,	       /* all of it; its waiters are awake */
	UFFD_PART = 1,	       /* a prefix; its waiters are awake; go on behind it */
	UFFD_THERE = 2,	       /* a page is there already and nobody was woken: wake */
	UFFD_AGAIN = 3,	       /* the mapping is changing: drain the events, then try again */
	UFFD_UNMAPPED = 4,     /* not mapped or not registered any more */
	UFFD_PROCESS_GONE = 5, /* the VMM's address space is gone */
	UFFD_NO_MEMORY = 6,    /* no memory, or no huge page */
	UFFD_NO_PAGE = 7,      /* CONTINUE: nothing in the page cache */
	UFFD_UNEXPECTED = 8,   /* no policy: our bug, or a kernel we do not know */
	UFFD_ANSWERS = 9,
};

/* done_bytes: the prefix that is in place, for DONE and PART. error: errno, for the log. */
struct uffd_result {
	enum uffd_answer answer;
	int error;
	uint64_t done_bytes;
};

/* What the pager asks of the kernel: functions, so that a test can answer in the kernel's place. `fd` is handed through. */
struct uffd_edge {
	struct uffd_result (*install)(int fd, enum uffd_op op, uint64_t dst, uint64_t src, uint64_t len_bytes);
	int (*wake)(int fd, uint64_t start, uint64_t len_bytes);	    /* 0 or errno */
	int (*unprotect)(int fd, uint64_t start, uint64_t len_bytes);	    /* 0 or errno */
	int (*unregister)(int fd, uint64_t start, uint64_t len_bytes);	    /* 0 or errno */
	ssize_t (*read)(int fd, struct uffd_msg *messages, size_t len_bytes); /* bytes or -errno */
	bool (*has_huge_page)(uint64_t page_bytes); /* whether anybody could get one now; NULL: always */
	/* Whether the VMM is in the middle of a call that announces itself by an event (madvise, munmap, mremap, fork): its event
	 * may be read, or be still to come. [start, start + len) is or was registered. NULL: never. */
	bool (*is_changing)(int fd, uint64_t start, uint64_t len_bytes);
};

extern const struct uffd_edge uffd_kernel;

/* The policy: what (op, errno, the call's result field) means. errno 0: success. Source: ioctl_userfaultfd(2). */
struct uffd_result uffd_classify(enum uffd_op op, int error, int64_t result, uint64_t len_bytes);

/* 1 if [start, start + len) lies in a registered mapping, 0 if not, -errno if the kernel said something else. Changes
 * nothing: a COPY from an unreadable address gets as far as the destination's checks and then fails with EFAULT. */
int uffd_probe_registered(int fd, uint64_t start, uint64_t len_bytes);

#endif
