// sources: uffd.c
#include <errno.h>

#include "check.h"
#include "uffd.h"

struct expectation {
	enum uffd_op op;
	int error;
	int64_t result;
	enum uffd_answer answer;
	uint64_t done_bytes;
};

/* Source: ioctl_userfaultfd(2), and the table of docs/kernel-policy.md. 64 KiB were asked for. */
static const struct expectation expectations[] = {
	{ UFFD_OP_COPY, 0, 65536, UFFD_DONE, 65536 },
	{ UFFD_OP_ZEROPAGE, 0, 65536, UFFD_DONE, 65536 },
	{ UFFD_OP_CONTINUE, 0, 65536, UFFD_DONE, 65536 },
	{ UFFD_OP_POISON, 0, 65536, UFFD_DONE, 65536 },
	{ UFFD_OP_COPY, EEXIST, -EEXIST, UFFD_THERE, 0 },
	{ UFFD_OP_ZEROPAGE, EEXIST, -EEXIST, UFFD_THERE, 0 },
	{ UFFD_OP_COPY, EAGAIN, 4096, UFFD_PART, 4096 },
	{ UFFD_OP_COPY, EAGAIN, 61440, UFFD_PART, 61440 },
	{ UFFD_OP_CONTINUE, EAGAIN, 8192, UFFD_PART, 8192 },
	{ UFFD_OP_COPY, EAGAIN, -EAGAIN, UFFD_AGAIN, 0 },
	{ UFFD_OP_COPY, EAGAIN, 0, UFFD_AGAIN, 0 },
	{ UFFD_OP_ZEROPAGE, EAGAIN, 0, UFFD_AGAIN, 0 },
	{ UFFD_OP_COPY, ENOENT, -ENOENT, UFFD_UNMAPPED, 0 },
	{ UFFD_OP_COPY, ESRCH, 0, UFFD_PROCESS_GONE, 0 },
	{ UFFD_OP_POISON, ESRCH, 0, UFFD_PROCESS_GONE, 0 },
	{ UFFD_OP_COPY, ENOMEM, -ENOMEM, UFFD_NO_MEMORY, 0 },
	{ UFFD_OP_COPY, ENOSPC, -ENOSPC, UFFD_NO_MEMORY, 0 },
	{ UFFD_OP_CONTINUE, EFAULT, -EFAULT, UFFD_NO_PAGE, 0 },
	{ UFFD_OP_COPY, EFAULT, -EFAULT, UFFD_UNEXPECTED, 0 },
	{ UFFD_OP_ZEROPAGE, EINVAL, 0, UFFD_UNEXPECTED, 0 },
	{ UFFD_OP_COPY, EBADF, 0, UFFD_UNEXPECTED, 0 },
	/* A prefix counts whatever stopped it. */
	{ UFFD_OP_COPY, ENOMEM, 4096, UFFD_PART, 4096 },
};

int main(void)
{
	unsigned seen = 0;

	for (size_t i = 0; i < sizeof(expectations) / sizeof(expectations[0]); i++) {
		const struct expectation *e = &expectations[i];
		struct uffd_result r = uffd_classify(e->op, e->error, e->result, 65536);

		CHECK_EQ(r.answer, e->answer);
		CHECK_EQ(r.done_bytes, e->done_bytes);
		CHECK_EQ(r.error, e->error);
		seen |= 1u << r.answer;
	}
	/* Every answer has a case. */
	CHECK_EQ(seen, (1u << UFFD_ANSWERS) - 1);
	/* Not a userfaultfd. */
	CHECK(uffd_probe_registered(-1, 4096, 4096) == -EBADF);
	return 0;
}
