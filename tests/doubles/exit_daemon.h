/* A small daemon for tests of libpostcopy: takes a hand-off, serves its exit ring through the daemon's own C. */
#ifndef POSTCOPY_TESTS_EXIT_DAEMON_H
#define POSTCOPY_TESTS_EXIT_DAEMON_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "exit_ring.h"

#define EXIT_DAEMON_HOLD (-1) /* leave the fault unanswered */

struct exit_daemon {
	const char *path;
	void *context;
	/* Returns the status to answer with. Called on the daemon's thread. */
	int (*resolve)(struct exit_daemon *daemon, const struct exit_fault *fault);
	/* A userfaultfd event at this host address, or NULL if there are none to expect. */
	void (*touched)(struct exit_daemon *daemon, uint64_t address);
	bool refuse; /* close instead of acknowledging */

	/* Of the hand-off, valid once exit_daemon_wait_attached returned. */
	int uffd, doorbell;
	struct exit_ring ring;
	char message[1 << 16];

	/* How it was told to end. */
	bool complete;
	/* Its own. */
	int listener, connection, ring_fd, stop_fd, attached_fd;
	void *mem;
	size_t len;
	pthread_t thread;
};

/* Listen at daemon->path and serve the first VMM that comes, on a thread. */
void exit_daemon_start(struct exit_daemon *daemon);
void exit_daemon_wait_attached(struct exit_daemon *daemon);

/* End as a daemon that is killed does: whatever is unanswered stays so. */
void exit_daemon_crash(struct exit_daemon *daemon);

/* End as after a migration that is complete. */
void exit_daemon_finish(struct exit_daemon *daemon);

#endif
