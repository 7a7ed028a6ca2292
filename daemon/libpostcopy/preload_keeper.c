/* A thread for each block, which stays until the block's memory is complete.
 *
 * It holds the userfaultfd, as the end of a daemon that held the last one would turn absent pages into zeros, and the
 * state memory. When the daemon goes before the memory is complete, the guest waits, and the block is handed to the next
 * one that listens.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <libgen.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "preload.h"
#include "uffd.h"

/* A socket file is there a moment before anybody listens; a daemon that refuses once may take the block later. */
#define LISTEN_RETRY_NS 1000000L
#define LISTEN_RETRY_MAX_NS 128000000L
#define REFUSED_RETRY_NS 1000000000L

static void pause_ns(long ns)
{
	struct timespec time = { ns / 1000000000, ns % 1000000000 };

	nanosleep(&time, NULL);
}

static int watch_folder(const char *socket)
{
	char path[sizeof((struct sockaddr_un *)0)->sun_path];
	int watch = inotify_init1(IN_CLOEXEC);

	strncpy(path, socket, sizeof path - 1);
	path[sizeof path - 1] = 0;
	if (watch < 0 || inotify_add_watch(watch, dirname(path), IN_CREATE | IN_MOVED_TO) < 0)
		preload_fail("%s: its folder cannot be watched: %s", socket, strerror(errno));
	return watch;
}

/* Wait until the folder changes. */
static void await_change(int watch)
{
	char events[4096] __attribute__((aligned(__alignof__(struct inotify_event))));

	if (read(watch, events, sizeof events) < 0 && errno != EINTR)
		preload_fail("inotify: %s", strerror(errno));
}

/* Hand the block over to whoever listens at its socket, as soon as somebody does; false and errno: it was refused, or
 * nobody can be reached there. */
static bool hand_over_when_possible(struct preload_block *block)
{
	int watch = watch_folder(block->socket), result, error = 0;
	long wait_ns = LISTEN_RETRY_NS;

	/* The watch is older than the attempt, so that no socket appears unseen between the two. */
	while ((result = handoff(block))) {
		error = errno;
		if (error == ENOENT) {
			await_change(watch);
			wait_ns = LISTEN_RETRY_NS;
		} else if (error == ECONNREFUSED || error == EAGAIN) {
			pause_ns(wait_ns);
			wait_ns = wait_ns < LISTEN_RETRY_MAX_NS ? 2 * wait_ns : wait_ns;
		} else {
			break;
		}
	}
	close(watch);
	errno = error;
	return !result;
}

/* Wait for the daemon to close the socket; it says nothing more. */
static void await_hangup(int sock)
{
	char byte;

	while (recv(sock, &byte, 1, 0) > 0 || errno == EINTR)
		errno = 0;
}

static bool needs_daemon(struct preload_block *block)
{
	uint64_t start;
	bool any;

	pthread_mutex_lock(&preload.lock);
	any = block->ranges;
	start = block->range[0].start;
	pthread_mutex_unlock(&preload.lock);
	/* Not under the lock: the probe maps memory, and so comes by here. */
	return any && uffd_probe_registered(block->uffd, start, block->page_size) != 0;
}

static _Noreturn void fail_handoff(const struct preload_block *block)
{
	preload_fail("%s cannot be handed over at %s: %s", block->ram, block->socket,
		     errno == EPROTO ? "refused; postcopyd's log says why" : strerror(errno));
}

static void *keep(void *argument)
{
	struct preload_block *block = argument;

	if (!block->handed_over && !hand_over_when_possible(block))
		fail_handoff(block);
	for (;;) {
		await_hangup(block->sock);
		close(block->sock);
		if (!needs_daemon(block))
			break;
		preload_say("postcopyd went before %s was complete: the guest waits, its memory is handed over again when one "
			    "listens at %s",
			    block->ram, block->socket);
		while (!hand_over_when_possible(block))
			pause_ns(REFUSED_RETRY_NS);
	}
	pthread_mutex_lock(&preload.lock);
	close(block->uffd);
	block->uffd = -1;
	if (block->state >= 0)
		close(block->state);
	block->state = -1;
	pthread_mutex_unlock(&preload.lock);
	return NULL;
}

void keeper_start(struct preload_block *block)
{
	sigset_t all, before;
	pthread_t thread;
	int error;

	if (!preload.wait && handoff(block))
		fail_handoff(block);
	/* The VMM's signals are for its own threads. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&thread, NULL, keep, block);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (error)
		preload_fail("no thread: %s", strerror(error));
	pthread_detach(thread);
}
