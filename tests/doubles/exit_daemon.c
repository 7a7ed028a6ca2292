#define _GNU_SOURCE
#include "exit_daemon.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "../c/check.h"

#define BATCH 64

static void receive(struct exit_daemon *daemon)
{
	union {
		char bytes[CMSG_SPACE(3 * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec iov = { daemon->message, sizeof(daemon->message) };
	struct msghdr message = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)
	};
	uint32_t length;
	size_t got;
	int fds[3];

	got = (size_t)recvmsg(daemon->connection, &message, 0);
	CHECK(got > sizeof(length) && !(message.msg_flags & (MSG_CTRUNC | MSG_TRUNC)));
	memcpy(&length, daemon->message, sizeof(length));
	while (got < length + sizeof(length)) {
		ssize_t more = recv(daemon->connection, daemon->message + got, sizeof(daemon->message) - got, 0);

		CHECK(more > 0);
		got += (size_t)more;
	}
	memmove(daemon->message, daemon->message + sizeof(length), length);
	daemon->message[length] = 0;
	memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fds));
	daemon->uffd = fds[0];
	daemon->ring_fd = fds[1];
	daemon->doorbell = fds[2];
}

static void serve_faults(struct exit_daemon *daemon)
{
	struct exit_fault faults[BATCH];
	unsigned count;

	do {
		CHECK_EQ(exit_ring_drain(&daemon->ring, faults, BATCH, &count), EXIT_RING_OK);
		for (unsigned i = 0; i < count; i++) {
			int status = daemon->resolve(daemon, &faults[i]);

			if (status != EXIT_DAEMON_HOLD)
				CHECK_EQ(exit_ring_complete(&daemon->ring, faults[i].vcpu, faults[i].gpa,
							    faults[i].sequence, (uint32_t)status),
					 EXIT_RING_OK);
		}
	} while (count == BATCH || !exit_ring_arm(&daemon->ring));
}

static void serve_touches(struct exit_daemon *daemon)
{
	struct uffd_msg message;

	while (read(daemon->uffd, &message, sizeof(message)) == sizeof(message)) {
		CHECK_EQ(message.event, UFFD_EVENT_PAGEFAULT);
		daemon->touched(daemon, message.arg.pagefault.address);
	}
}

static bool attach(struct exit_daemon *daemon)
{
	uint64_t one = 1;

	receive(daemon);
	if (daemon->refuse) {
		close(daemon->connection);
		daemon->connection = -1;
	} else {
		CHECK_EQ(exit_ring_map(daemon->ring_fd, &daemon->mem, &daemon->len), EXIT_RING_OK);
		CHECK_EQ(exit_ring_attach(&daemon->ring, daemon->mem, daemon->len), EXIT_RING_OK);
		CHECK_EQ(write(daemon->connection, "K", 1), 1);
	}
	CHECK_EQ(write(daemon->attached_fd, &one, sizeof(one)), sizeof(one));
	return !daemon->refuse;
}

static void *run(void *argument)
{
	struct exit_daemon *daemon = argument;
	struct pollfd entry[3] = { { .fd = daemon->stop_fd, .events = POLLIN }, { .fd = daemon->listener, .events = POLLIN } };

	while (poll(entry, 2, -1) < 0)
		CHECK_EQ(errno, EINTR);
	if (entry[0].revents)
		return NULL;
	daemon->connection = accept4(daemon->listener, NULL, NULL, SOCK_CLOEXEC);
	CHECK(daemon->connection >= 0);
	if (!attach(daemon))
		return NULL;
	entry[1].fd = daemon->doorbell;
	entry[2] = (struct pollfd){ .fd = daemon->touched ? daemon->uffd : -1, .events = POLLIN };
	do {
		serve_faults(daemon);
		if (poll(entry, 3, -1) < 0)
			CHECK_EQ(errno, EINTR);
		if (entry[1].revents)
			CHECK(exit_ring_quiet(daemon->doorbell));
		if (entry[2].revents)
			serve_touches(daemon);
	} while (!entry[0].revents);
	if (daemon->complete)
		exit_ring_set_complete(&daemon->ring);
	return NULL;
}

void exit_daemon_start(struct exit_daemon *daemon)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	strncpy(address.sun_path, daemon->path, sizeof(address.sun_path) - 1);
	unlink(daemon->path);
	daemon->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(daemon->listener >= 0);
	CHECK_EQ(bind(daemon->listener, (struct sockaddr *)&address, sizeof(address)), 0);
	CHECK_EQ(listen(daemon->listener, 1), 0);
	daemon->stop_fd = eventfd(0, EFD_CLOEXEC);
	daemon->attached_fd = eventfd(0, EFD_CLOEXEC);
	daemon->connection = daemon->uffd = daemon->ring_fd = daemon->doorbell = -1;
	daemon->mem = NULL;
	daemon->complete = false;
	CHECK_EQ(pthread_create(&daemon->thread, NULL, run, daemon), 0);
}

void exit_daemon_wait_attached(struct exit_daemon *daemon)
{
	uint64_t count;

	CHECK_EQ(read(daemon->attached_fd, &count, sizeof(count)), sizeof(count));
}

static void close_one(int fd)
{
	if (fd >= 0)
		close(fd);
}

void exit_daemon_crash(struct exit_daemon *daemon)
{
	uint64_t one = 1;

	CHECK_EQ(write(daemon->stop_fd, &one, sizeof(one)), sizeof(one));
	CHECK_EQ(pthread_join(daemon->thread, NULL), 0);
	if (daemon->mem) {
		exit_ring_detach(&daemon->ring);
		exit_ring_unmap(daemon->mem, daemon->len);
	}
	close_one(daemon->uffd);
	close_one(daemon->ring_fd);
	close_one(daemon->doorbell);
	close_one(daemon->stop_fd);
	close_one(daemon->attached_fd);
	close_one(daemon->listener);
	/* Last, as that is what the VMM sees. */
	close_one(daemon->connection);
}

void exit_daemon_finish(struct exit_daemon *daemon)
{
	daemon->complete = true;
	exit_daemon_crash(daemon);
}
