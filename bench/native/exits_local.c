/*
 * How faults of vCPUs are delivered, with content that is at hand: as messages of one userfaultfd, or as exits through
 * libpostcopy, either answered over the exit ring or by the vCPU's own thread, which has the image. One thread answers, in C;
 * the guest is real.
 *
 *     exits_local VCPUS PAGES ROUNDS own|overlap
 *
 * Each round runs all three, the next begins with another. Prints
 * {"exit_us": …, "uffd": [ROUND…], "ring": [ROUND…], "exits": [ROUND…]}, exits being those of vCPUs that have the image.
 */
#define _GNU_SOURCE
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "exit_ring.h"
#include "exits_vm.h"

#define AT_ONCE 128u

struct resolver {
	const struct vm *vm;
	const uint8_t *image;
	bool *installed;
	bool local; /* vCPUs install by themselves */
	int uffd, stop;
	pthread_t thread;
	/* Exits: taken from a hand-off. */
	int listener, doorbell;
	struct exit_ring ring;
	void *mem;
	size_t len;
};

static void install(struct resolver *r, size_t page)
{
	struct uffdio_copy copy = {
		.dst = (uintptr_t)r->vm->memory + page * PAGE, .src = (uintptr_t)r->image + page * PAGE, .len = PAGE};

	NEED(page < r->vm->pages);
	if (!r->installed[page]) {
		r->installed[page] = true;
		NEED(ioctl(r->uffd, UFFDIO_COPY, &copy) == 0);
		return;
	}
	/* Asked for before it was there: a message's sender must still be woken. */
	struct uffdio_range range = {.start = copy.dst, .len = PAGE};
	NEED(ioctl(r->uffd, UFFDIO_WAKE, &range) == 0);
}

static void answer_messages(struct resolver *r)
{
	struct uffd_msg messages[AT_ONCE];
	ssize_t got = read(r->uffd, messages, sizeof(messages));

	NEED(got > 0 || errno == EAGAIN);
	for (ssize_t i = 0; i < got / (ssize_t)sizeof(messages[0]); i++)
		install(r, (messages[i].arg.pagefault.address - (uintptr_t)r->vm->memory) / PAGE);
}

static void answer_exits(struct resolver *r)
{
	NEED(exit_ring_quiet(r->doorbell));
	for (;;) {
		struct exit_fault faults[AT_ONCE];
		unsigned count;

		NEED(exit_ring_drain(&r->ring, faults, AT_ONCE, &count) == EXIT_RING_OK);
		for (unsigned i = 0; i < count; i++) {
			size_t page = (faults[i].gpa - VM_MEMORY_GPA) / PAGE;

			if (!r->installed[page])
				install(r, page);
			exit_ring_mark(&r->ring, page, 1, true);
			NEED(exit_ring_complete(&r->ring, faults[i].vcpu, faults[i].gpa, faults[i].sequence, EXIT_RESOLVED) == 0);
		}
		if (count == 0 && exit_ring_arm(&r->ring))
			return;
	}
}

/* Take the descriptors that libpostcopy names in its message: userfaultfd, ring, doorbell, and the image if there is one. */
static void take_handoff(struct resolver *r)
{
	static char text[64 << 10];
	int sock = accept4(r->listener, NULL, NULL, SOCK_CLOEXEC), fds[4];
	size_t len = (r->local ? 4 : 3) * sizeof(fds[0]);
	struct iovec iov = {text, sizeof(text)};
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(sizeof(fds))];
	} control;
	struct msghdr message = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};

	NEED(sock >= 0 && recvmsg(sock, &message, MSG_CMSG_CLOEXEC) > 0);
	errno = EPROTO;
	NEED(CMSG_FIRSTHDR(&message) && CMSG_FIRSTHDR(&message)->cmsg_len == CMSG_LEN(len));
	memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&message)), len);
	r->doorbell = fds[2];
	NEED(exit_ring_map(fds[1], &r->mem, &r->len) == EXIT_RING_OK);
	NEED(exit_ring_attach(&r->ring, r->mem, r->len) == EXIT_RING_OK);
	if (r->local) {
		exit_ring_allow_local(&r->ring);
		exit_ring_open(&r->ring);
		close(fds[3]);
	}
	close(fds[0]);
	close(fds[1]);
	NEED(send(sock, "\1", 1, MSG_NOSIGNAL) == 1);
	/* Kept by libpostcopy's end for as long as the round lasts; nothing more is said. */
	close(sock);
}

static void *resolver_main(void *argument)
{
	struct resolver *r = argument;

	r->doorbell = -1;
	if (r->listener >= 0) {
		take_handoff(r);
		answer_exits(r);
	}
	for (;;) {
		struct pollfd wait[] = {
			{.fd = r->stop, .events = POLLIN}, {.fd = r->uffd, .events = POLLIN}, {.fd = r->doorbell, .events = POLLIN}};

		NEED(poll(wait, 3, -1) > 0);
		if (wait[0].revents)
			return NULL;
		if (wait[1].revents)
			answer_messages(r);
		if (wait[2].revents)
			answer_exits(r);
	}
}

static int listen_at(char *path, size_t room)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(path, room, "/tmp/postcopyd-bench-exits-%d", getpid());
	unlink(path);
	strcpy(address.sun_path, path);
	NEED(listener >= 0 && bind(listener, (struct sockaddr *)&address, sizeof(address)) == 0 && listen(listener, 1) == 0);
	return listener;
}

struct image {
	int fd;
	uint8_t *bytes;
};

enum way { BY_UFFD, BY_RING, BY_OWN_THREAD, WAYS };

static const char *const way_names[WAYS] = {"uffd", "ring", "exits"};

static struct vm_round run_round(struct vm *vm, const struct image *image, enum way way, bool overlap)
{
	bool exits = way != BY_UFFD;
	struct resolver r = {.vm = vm,
			     .image = image->bytes,
			     .listener = -1,
			     .local = way == BY_OWN_THREAD,
			     .installed = calloc(vm->pages, sizeof(bool))};
	struct vm_round round;
	char path[64];

	vm_forget_memory(vm);
	r.uffd = vm_register(vm, exits);
	r.stop = eventfd(0, EFD_CLOEXEC);
	NEED(r.installed && r.stop >= 0);
	if (exits)
		r.listener = listen_at(path, sizeof(path));
	NEED(pthread_create(&r.thread, NULL, resolver_main, &r) == 0);
	if (exits)
		vm_connect(vm, path, r.uffd, r.local ? image->fd : -1);
	round = vm_run(vm, overlap);
	NEED(eventfd_write(r.stop, 1) == 0 && pthread_join(r.thread, NULL) == 0);
	if (exits) {
		vm_disconnect(vm);
		exit_ring_detach(&r.ring);
		exit_ring_unmap(r.mem, r.len);
		close(r.doorbell);
		close(r.listener);
		unlink(path);
	}
	vm_unregister(vm, r.uffd);
	close(r.stop);
	free(r.installed);
	return round;
}

static struct image make_image(size_t pages)
{
	struct image image = {.fd = memfd_create("image", MFD_CLOEXEC)};

	NEED(image.fd >= 0 && ftruncate(image.fd, (off_t)(pages * PAGE)) == 0);
	image.bytes = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, image.fd, 0);
	NEED(image.bytes != MAP_FAILED);
	memset(image.bytes, 0x5a, pages * PAGE);
	for (size_t page = 0; page < pages; page++)
		*(uint64_t *)(image.bytes + page * PAGE) = page + 1;
	return image;
}

static void print_rounds(const char *name, const struct vm_round *rounds, unsigned count)
{
	printf(", \"%s\": [", name);
	for (unsigned i = 0; i < count; i++) {
		printf("%s", i ? ", " : "");
		vm_print_round(&rounds[i]);
	}
	putchar(']');
}

int main(int argc, char **argv)
{
	unsigned vcpus = argc == 5 ? (unsigned)strtoul(argv[1], NULL, 10) : 0;
	size_t pages = vcpus ? strtoul(argv[2], NULL, 10) : 0;
	unsigned count = vcpus ? (unsigned)strtoul(argv[3], NULL, 10) : 0;
	bool overlap = vcpus && strcmp(argv[4], "overlap") == 0;
	struct vm_round *rounds[WAYS];
	struct image image;
	struct vm vm;

	if (!count) {
		fprintf(stderr, "usage: exits_local VCPUS PAGES ROUNDS own|overlap\n");
		return 2;
	}
	vm_init(&vm, vcpus, pages);
	image = make_image(pages);
	for (unsigned way = 0; way < WAYS; way++) {
		rounds[way] = calloc(count, sizeof(*rounds[way]));
		NEED(rounds[way]);
	}
	for (unsigned i = 0; i < WAYS * count; i++) {
		unsigned way = (i + i / WAYS) % WAYS;
		struct vm_round round = run_round(&vm, &image, way, overlap);

		errno = EIO;
		NEED(round.wrong == 0);
		rounds[way][i / WAYS] = round;
	}
	printf("{\"exit_us\": %.1f", (double)vm_exit_cost_ns(&vm) / 1000);
	for (unsigned way = 0; way < WAYS; way++)
		print_rounds(way_names[way], rounds[way], count);
	puts("}");
	vm_deinit(&vm);
	return 0;
}
