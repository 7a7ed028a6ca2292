#define _GNU_SOURCE
#include "attach.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* uffd, exit_ring, exit_notify, and image if there is one: as message.c names them. */
#define DESCRIPTORS_MAX 4

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Wait until the socket is ready for `events`. 0, -ETIMEDOUT or -errno. */
static int wait_ready(int sock, short events, int64_t deadline_ms)
{
	for (;;) {
		struct pollfd entry = { .fd = sock, .events = events };
		int64_t left = deadline_ms - now_ms();
		int ready = left > 0 ? poll(&entry, 1, (int)left) : 0;

		if (ready > 0)
			return 0;
		if (ready == 0)
			return -ETIMEDOUT;
		if (errno != EINTR)
			return -errno;
	}
}

static int connect_to(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int sock;

	if (strlen(path) >= sizeof(address.sun_path))
		return -ENAMETOOLONG;
	strcpy(address.sun_path, path);
	sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (sock < 0)
		return -errno;
	/* A UNIX socket connects at once or not at all: EAGAIN is a full backlog. */
	if (connect(sock, (struct sockaddr *)&address, sizeof(address))) {
		int error = errno;

		close(sock);
		return -error;
	}
	return sock;
}

/* Send what the socket takes; the descriptors go with the first bytes. */
static ssize_t send_some(int sock, const struct postcopy *pc, size_t sent)
{
	const int fds[DESCRIPTORS_MAX] = { pc->uffd, pc->ring_fd, pc->doorbell, pc->image_fd };
	const size_t len = (pc->image_fd >= 0 ? DESCRIPTORS_MAX : DESCRIPTORS_MAX - 1) * sizeof(fds[0]);
	union {
		char bytes[CMSG_SPACE(sizeof(fds))];
		struct cmsghdr align;
	} control = { { 0 } };
	struct iovec iov = { pc->frame + sent, pc->frame_len - sent };
	struct msghdr message = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (!sent) {
		struct cmsghdr *header;

		message.msg_control = control.bytes;
		message.msg_controllen = CMSG_SPACE(len);
		header = CMSG_FIRSTHDR(&message);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(len);
		memcpy(CMSG_DATA(header), fds, len);
	}
	return sendmsg(sock, &message, MSG_NOSIGNAL);
}

static int send_frame(int sock, const struct postcopy *pc, int64_t deadline_ms)
{
	size_t sent = 0;

	while (sent < pc->frame_len) {
		ssize_t some;
		int error = wait_ready(sock, POLLOUT, deadline_ms);

		if (error)
			return error;
		some = send_some(sock, pc, sent);
		if (some < 0 && errno == EPIPE)
			return -EPROTO;
		if (some < 0 && errno != EINTR && errno != EAGAIN)
			return -errno;
		sent += some > 0 ? (size_t)some : 0;
	}
	return 0;
}

/* One byte says yes; a closed socket says no, and the daemon's log says why. */
static int await_acknowledgement(int sock, int64_t deadline_ms)
{
	for (;;) {
		uint8_t byte;
		ssize_t got;
		int error = wait_ready(sock, POLLIN, deadline_ms);

		if (error)
			return error;
		got = recv(sock, &byte, 1, 0);
		if (got == 1)
			return 0;
		if (got == 0 || errno == ECONNRESET)
			return -EPROTO;
		if (errno != EINTR && errno != EAGAIN)
			return -errno;
	}
}

int attach_daemon(const struct postcopy *pc)
{
	int64_t deadline_ms = now_ms() + pc->timeout_ms;
	int sock = connect_to(pc->path), error;

	if (sock < 0)
		return sock;
	error = send_frame(sock, pc, deadline_ms);
	if (!error)
		error = await_acknowledgement(sock, deadline_ms);
	if (!error)
		return sock;
	close(sock);
	return error;
}
