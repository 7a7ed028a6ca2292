/* One hand-off: the framed message with the userfaultfd, and the byte that accepts it, with which comes the daemon's state
 * memory. To the next daemon both descriptors are sent, so that it goes on where the last one stopped. docs/protocol.md. */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "preload.h"

#define LENGTH_BYTES 4u
#define MESSAGE_BYTES_MAX (64u << 10)
#define ANSWER_TIMEOUT_MS 10000

_Static_assert(PRELOAD_RANGES_MAX * 200 < MESSAGE_BYTES_MAX, "a full table fits a message");

/* Write the message for what the block tells; its length. Where a byte lies in guest physical memory is not known here:
 * its place in the file stands for it, which is as unique. */
static size_t write_message(const struct preload_block *block, char message[MESSAGE_BYTES_MAX])
{
	char *body = message + LENGTH_BYTES;
	size_t room = MESSAGE_BYTES_MAX - LENGTH_BYTES, len;
	uint32_t length;

	len = (size_t)snprintf(body, room, "{\"type\":\"handoff\",\"version\":0,\"vmm_pid\":%u,\"mode\":\"MISSING\",\"regions\":[",
			       (unsigned)getpid());
	for (size_t i = 0; i < block->told; i++) {
		const struct preload_range *range = &block->tell[i];

		len += (size_t)snprintf(body + len, room - len,
					"%s{\"guest_phys_addr\":%" PRIu64 ",\"host_virt_addr\":%" PRIu64 ",\"size\":%" PRIu64
					",\"backing_file_offset\":%" PRIu64 ",\"page_size\":%" PRIu64 "}",
					i ? "," : "", range->offset, range->start, range->len, range->offset,
					block->page_size);
	}
	len += (size_t)snprintf(body + len, room - len, "],\"keep_state\":true,\"descriptors\":[\"uffd\"%s]}",
				block->state < 0 ? "" : ",\"state\"");
	length = (uint32_t)len;
	memcpy(message, &length, LENGTH_BYTES);
	return LENGTH_BYTES + len;
}

static int connect_to(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), error;

	if (sock < 0)
		return -1;
	strncpy(address.sun_path, path, sizeof address.sun_path - 1);
	if (!connect(sock, (struct sockaddr *)&address, sizeof address))
		return sock;
	error = errno;
	close(sock);
	errno = error;
	return -1;
}

union control {
	char bytes[CMSG_SPACE(2 * sizeof(int))];
	struct cmsghdr align;
};

static bool send_message(int sock, const struct preload_block *block, const char *message, size_t len)
{
	int descriptors[] = { block->uffd, block->state };
	size_t bytes = (block->state < 0 ? 1 : 2) * sizeof(int);
	union control control = { 0 };
	struct iovec io = { (char *)message, len };
	struct msghdr header = {
		.msg_iov = &io, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_SPACE(bytes)
	};
	struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
	ssize_t sent;

	rights->cmsg_level = SOL_SOCKET;
	rights->cmsg_type = SCM_RIGHTS;
	rights->cmsg_len = CMSG_LEN(bytes);
	memcpy(CMSG_DATA(rights), descriptors, bytes);
	sent = sendmsg(sock, &header, MSG_NOSIGNAL);
	while (sent >= 0 && (size_t)sent < len) {
		message += sent;
		len -= (size_t)sent;
		sent = send(sock, message, len, MSG_NOSIGNAL);
	}
	return sent >= 0;
}

static void keep_state(struct preload_block *block, struct msghdr *header)
{
	struct cmsghdr *rights = CMSG_FIRSTHDR(header);

	if (!rights || rights->cmsg_type != SCM_RIGHTS || rights->cmsg_len != CMSG_LEN(sizeof(int)))
		return;
	if (block->state >= 0)
		close(block->state);
	memcpy(&block->state, CMSG_DATA(rights), sizeof(int));
}

static bool is_accepted(int sock, struct preload_block *block)
{
	struct pollfd answer = { .fd = sock, .events = POLLIN };
	char byte = 0;
	union control control;
	struct iovec io = { &byte, 1 };
	struct msghdr header = { .msg_iov = &io, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };

	if (poll(&answer, 1, ANSWER_TIMEOUT_MS) != 1 || recvmsg(sock, &header, MSG_CMSG_CLOEXEC) != 1 || byte != 1)
		return false;
	keep_state(block, &header);
	return true;
}

int handoff(struct preload_block *block)
{
	static char message[MESSAGE_BYTES_MAX]; /* written and sent under the lock */
	int sock = connect_to(block->socket);
	bool sent;

	if (sock < 0)
		return -1;
	pthread_mutex_lock(&preload.lock);
	if (!block->handed_over) {
		block->told = block->ranges;
		memcpy(block->tell, block->range, sizeof block->tell);
	}
	sent = send_message(sock, block, message, write_message(block, message));
	/* From here on events have a reader. */
	block->handed_over |= sent;
	pthread_mutex_unlock(&preload.lock);
	if (sent && is_accepted(sock, block)) {
		block->sock = sock;
		return 0;
	}
	close(sock);
	errno = EPROTO;
	return -1;
}
