/* postcopy_watch: stay attached to a daemon across its restarts. */
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <sys/socket.h>
#include <unistd.h>

#include "handle.h"

#define FIRST_PAUSE_MS 50
#define LONGEST_PAUSE_MS 1000

enum socket_news { SOCKET_CLOSED, SOCKET_STOP };

/* Wait `pause_ms` (-1: for ever). True: told to stop. */
static bool told_to_stop(const struct postcopy *pc, int pause_ms)
{
	struct pollfd entry = { .fd = pc->stop_fd, .events = POLLIN };

	return poll(&entry, 1, pause_ms) > 0;
}

static bool is_closed(int sock)
{
	uint8_t ignored[64];
	ssize_t got = recv(sock, ignored, sizeof(ignored), MSG_DONTWAIT);

	/* Nothing but the end is expected here; a later version may say more. */
	return got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR);
}

/* Wait until the daemon's end is closed. */
static enum socket_news wait_for_end(const struct postcopy *pc)
{
	for (;;) {
		struct pollfd entries[] = { { .fd = pc->socket, .events = POLLIN }, { .fd = pc->stop_fd, .events = POLLIN } };

		if (poll(entries, 2, -1) < 0)
			continue;
		if (entries[1].revents)
			return SOCKET_STOP;
		if (entries[0].revents && is_closed(pc->socket))
			return SOCKET_CLOSED;
	}
}

/* Try until somebody takes the hand-off. True: told to stop. */
static bool attach_again(struct postcopy *pc)
{
	int pause_ms = FIRST_PAUSE_MS;

	while (postcopy_reattach(pc)) {
		if (told_to_stop(pc, pause_ms))
			return true;
		pause_ms = pause_ms * 2 < LONGEST_PAUSE_MS ? pause_ms * 2 : LONGEST_PAUSE_MS;
	}
	return false;
}

int postcopy_watch(struct postcopy *pc)
{
	for (;;) {
		if (wait_for_end(pc) == SOCKET_STOP)
			return -ECANCELED;
		if (postcopy_is_complete(pc))
			return 0;
		if (attach_again(pc))
			return -ECANCELED;
	}
}

void postcopy_stop_watch(struct postcopy *pc)
{
	uint64_t one = 1;
	ssize_t written;

	/* It is never read, so that a watch that begins later stops too; EAGAIN: it is full of stops. */
	do
		written = write(pc->stop_fd, &one, sizeof(one));
	while (written < 0 && errno == EINTR);
}
