/*
 * The most pages a second that many threads can get from another process on this host: postcopyd's topology with nothing in
 * it but system calls, and all that batching gives.
 *
 * Threads of process A touch absent pages. Process B reads all faults there are, sends 16 bytes for each in one call, and
 * installs whatever whole pages it receives. Process C answers all requests that it receives, BLOCK_PAGES in one call. No
 * gRPC, no checksum, no ledger; nothing is placed.
 *
 *     remote THREADS COUNT
 */
#include <sys/uio.h>

#include "peers.h"
#include "touchers.h"

#define FAULTS 64
#define BLOCK_PAGES 8

static void send_pages(int sock, struct iovec *pages, int count)
{
	struct msghdr message = {.msg_iov = pages, .msg_iovlen = (size_t)count};

	while (message.msg_iovlen) {
		ssize_t n = sendmsg(sock, &message, 0);
		NEED(n > 0);
		for (; message.msg_iovlen && (size_t)n >= message.msg_iov->iov_len; message.msg_iov++, message.msg_iovlen--)
			n -= (ssize_t)message.msg_iov->iov_len;
		if (message.msg_iovlen) {
			message.msg_iov->iov_base = (uint8_t *)message.msg_iov->iov_base + n;
			message.msg_iov->iov_len -= (size_t)n;
		}
	}
}

/* Process C. */
static void serve_pages(int listener)
{
	uint8_t *content = map_memory(64 * PAGE, false), requests[FAULTS * REQUEST_BYTES];
	int sock = accept_from(listener);
	size_t have = 0;

	memset(content, 0x5a, 64 * PAGE);
	for (;;) {
		ssize_t n = recv(sock, requests + have, sizeof(requests) - have, 0);
		if (n <= 0)
			return;
		have += (size_t)n;
		for (size_t at = 0, count = have / REQUEST_BYTES; at < count; at += BLOCK_PAGES) {
			struct iovec pages[BLOCK_PAGES];
			int part = count - at < BLOCK_PAGES ? (int)(count - at) : BLOCK_PAGES;

			for (int i = 0; i < part; i++)
				pages[i] = (struct iovec){content + requests[(at + (size_t)i) * REQUEST_BYTES] % 64 * PAGE, PAGE};
			send_pages(sock, pages, part);
		}
		memmove(requests, requests + have / REQUEST_BYTES * REQUEST_BYTES, have % REQUEST_BYTES);
		have %= REQUEST_BYTES;
	}
}

/* Process B. */
static void handle_faults(int uffd, int sock)
{
	uint8_t *received = map_memory(FAULTS * PAGE, false);
	/* Faults that were asked for, oldest first; never more than there are threads. */
	static uint64_t asked[4096];
	size_t first = 0, last = 0, have = 0;
	struct pollfd wait[] = {{.fd = uffd, .events = POLLIN}, {.fd = sock, .events = POLLIN}};

	while (poll(wait, 2, -1) > 0 && !(wait[0].revents & POLLERR)) {
		if (wait[1].revents) {
			ssize_t n = recv(sock, received + have, FAULTS * PAGE - have, MSG_DONTWAIT);
			NEED(n > 0);
			have += (size_t)n;
			for (size_t at = 0; at < have / PAGE; at++)
				copy_in(uffd, asked[first++ % 4096], received + at * PAGE, PAGE);
			memmove(received, received + have / PAGE * PAGE, have % PAGE);
			have %= PAGE;
		}
		if (wait[0].revents) {
			struct uffd_msg messages[FAULTS];
			uint64_t requests[FAULTS][REQUEST_BYTES / 8];
			ssize_t n = read(uffd, messages, sizeof(messages));
			size_t count = n > 0 ? (size_t)n / sizeof(*messages) : 0;

			for (size_t i = 0; i < count; i++) {
				uint64_t address = messages[i].arg.pagefault.address & ~(PAGE - 1);
				asked[last++ % 4096] = address;
				requests[i][0] = address / PAGE;
				requests[i][1] = 0;
			}
			NEED(count == 0 || send(sock, requests, count * REQUEST_BYTES, 0) == (ssize_t)(count * REQUEST_BYTES));
		}
	}
}

int main(int argc, char **argv)
{
	size_t threads = argc == 3 ? strtoul(argv[1], NULL, 10) : 0;
	size_t each = threads ? strtoul(argv[2], NULL, 10) / threads : 0;
	struct sockaddr_in address;

	if (each == 0) {
		fprintf(stderr, "usage: remote THREADS COUNT\n");
		return 2;
	}
	size_t len = each * threads * PAGE;
	uint8_t *memory = map_memory(len, true);
	int uffd = register_missing(memory, len), listener = listen_on(&address);
	pid_t server, handler;

	if ((server = begin_child()) == 0) {
		serve_pages(listener);
		return 0;
	}
	if ((handler = begin_child()) == 0) {
		handle_faults(uffd, connect_to(&address));
		return 0;
	}
	printf("{\"pages_s\": %.0f}\n", touch_all(memory, threads, each));
	end_child(handler);
	end_child(server);
	return 0;
}
