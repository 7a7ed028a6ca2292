/*
 * One guest whose memory a daemon brings: handed over with a userfaultfd alone, or with an exit ring as well.
 *
 *     exits_remote uffd|exits VCPUS PAGES own|overlap SOCKET
 *
 * Prints one round as JSON.
 */
#define _GNU_SOURCE
#include <sys/socket.h>
#include <sys/un.h>

#include "exits_vm.h"

static int connect_to(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	NEED(strlen(path) < sizeof(address.sun_path));
	strcpy(address.sun_path, path);
	NEED(sock >= 0 && connect(sock, (struct sockaddr *)&address, sizeof(address)) == 0);
	return sock;
}

/* The framed hand-off of docs/protocol.md, with the userfaultfd as its only descriptor. */
static void hand_over(const struct vm *vm, int uffd, const char *path)
{
	char frame[512], *json = frame + sizeof(uint32_t);
	uint32_t len = (uint32_t)snprintf(
		json, sizeof(frame) - sizeof(len),
		"{\"type\":\"handoff\",\"version\":0,\"vmm_pid\":%d,\"mode\":\"MISSING\",\"regions\":[{\"guest_phys_addr\":%lu,"
		"\"host_virt_addr\":%" PRIuPTR ",\"size\":%zu,\"backing_file_offset\":0}]}",
		getpid(), VM_MEMORY_GPA, (uintptr_t)vm->memory, vm->pages * PAGE);
	struct iovec iov = {frame, sizeof(len) + len};
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	int sock = connect_to(path);
	uint8_t answer;

	memcpy(frame, &len, sizeof(len));
	control.header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
	memcpy(CMSG_DATA(&control.header), &uffd, sizeof(int));
	NEED(sendmsg(sock, &message, MSG_NOSIGNAL) == (ssize_t)iov.iov_len);
	errno = EPROTO;
	/* The socket stays open to the program's end, which the daemon takes for the VMM's. */
	NEED(recv(sock, &answer, 1, 0) == 1 && answer == 1);
}

int main(int argc, char **argv)
{
	bool exits = argc == 6 && strcmp(argv[1], "exits") == 0;
	struct vm_round round;
	struct vm vm;
	int uffd;

	if (argc != 6) {
		fprintf(stderr, "usage: exits_remote uffd|exits VCPUS PAGES own|overlap SOCKET\n");
		return 2;
	}
	vm_init(&vm, (unsigned)strtoul(argv[2], NULL, 10), strtoul(argv[3], NULL, 10));
	uffd = vm_register(&vm, exits);
	if (exits)
		vm_connect(&vm, argv[5], uffd, -1);
	else
		hand_over(&vm, uffd, argv[5]);
	round = vm_run(&vm, strcmp(argv[4], "overlap") == 0);
	errno = EIO;
	NEED(round.wrong == 0);
	vm_print_round(&round);
	putchar('\n');
	vm_deinit(&vm);
	return 0;
}
