/*
 * Serves one VMM an image of nothing but the 64-bit number 1. usage: example_daemon SOCKET; prints a line when it listens and
 * the number of faults when its input ends.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "../c/check.h"
#include "../doubles/exit_daemon.h"

static uint64_t page[512] __attribute__((aligned(4096)));
static uint64_t faults;

static uint64_t field(const char *message, const char *name)
{
	const char *at = strstr(message, name);

	CHECK(at != NULL);
	return strtoull(at + strlen(name), NULL, 10);
}

static int install(struct exit_daemon *daemon, const struct exit_fault *fault)
{
	uint64_t offset = fault->gpa - field(daemon->message, "\"guest_phys_addr\":");
	struct uffdio_copy copy = {
		.dst = field(daemon->message, "\"host_virt_addr\":") + offset, .src = (uintptr_t)page, .len = sizeof(page)
	};

	faults++;
	if (ioctl(daemon->uffd, UFFDIO_COPY, &copy))
		CHECK_EQ(errno, EEXIST);
	exit_ring_mark(&daemon->ring, offset >> 12, 1, true);
	return EXIT_RESOLVED;
}

int main(int argc, char **argv)
{
	static struct exit_daemon daemon = { .resolve = install };
	char end;

	CHECK(argc == 2);
	for (size_t i = 0; i < 512; i++)
		page[i] = 1;
	daemon.path = argv[1];
	exit_daemon_start(&daemon);
	puts("listening");
	fflush(stdout);
	while (read(0, &end, 1) > 0)
		;
	exit_daemon_crash(&daemon);
	printf("%llu\n", (unsigned long long)faults);
	return 0;
}
