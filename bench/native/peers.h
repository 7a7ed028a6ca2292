/* Processes beside the measuring one, and TCP between them on loopback. */
#ifndef POSTCOPY_BENCH_PEERS_H
#define POSTCOPY_BENCH_PEERS_H

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "bench.h"

#define REQUEST_BYTES 16

/* Returns twice, as fork does; the child ends with its parent at the latest. */
static inline pid_t begin_child(void)
{
	pid_t pid = fork();

	NEED(pid >= 0);
	if (pid == 0)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return pid;
}

static inline void end_child(pid_t pid)
{
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

static inline int listen_on(struct sockaddr_in *address)
{
	socklen_t len = sizeof(*address);
	int listener = socket(AF_INET, SOCK_STREAM, 0);

	*address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	NEED(listener >= 0 && bind(listener, (struct sockaddr *)address, len) == 0);
	NEED(listen(listener, 4) == 0 && getsockname(listener, (struct sockaddr *)address, &len) == 0);
	return listener;
}

static inline int send_at_once(int sock)
{
	int on = 1;

	NEED(sock >= 0 && setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) == 0);
	return sock;
}

static inline int accept_from(int listener)
{
	return send_at_once(accept(listener, NULL, NULL));
}

static inline int connect_to(const struct sockaddr_in *address)
{
	int sock = socket(AF_INET, SOCK_STREAM, 0);

	NEED(sock >= 0 && connect(sock, (const struct sockaddr *)address, sizeof(*address)) == 0);
	return send_at_once(sock);
}

#endif
