/*
 * The least that a remote page costs on this host: postcopyd's topology with nothing in it but system calls.
 *
 * Process A touches absent pages; process B reads the fault, sends 16 bytes over TCP to process C, receives 4 KiB
 * and installs them. Beside it, what the parts cost alone: the round trip between two processes, and a fault that B
 * answers from its own memory.
 *
 *     floor FAULTS GUEST_CPU HOST_CPU
 *
 * A runs on the one CPU, B and C on the other.
 */
#define _GNU_SOURCE
#include <sched.h>

#include "peers.h"

static bool receive_all(int sock, void *into, size_t len)
{
	for (uint8_t *at = into; len;) {
		ssize_t n = recv(sock, at, len, 0);
		if (n <= 0)
			return false;
		at += n;
		len -= (size_t)n;
	}
	return true;
}

static void ask_page(int sock, uint64_t page, uint8_t *into)
{
	uint64_t request[REQUEST_BYTES / 8] = {page, 0};

	NEED(send(sock, request, sizeof(request), 0) == sizeof(request));
	NEED(receive_all(sock, into, PAGE));
}

/* Process C: one client after the other gets 4 KiB for every 16 bytes. */
static void serve_pages(int listener)
{
	uint8_t *content = map_memory(64 * PAGE, false);
	uint64_t request[REQUEST_BYTES / 8];

	memset(content, 0x5a, 64 * PAGE);
	for (;;) {
		int sock = accept_from(listener);
		while (receive_all(sock, request, sizeof(request)))
			NEED(send(sock, content + request[0] % 64 * PAGE, PAGE, 0) == (ssize_t)PAGE);
		close(sock);
	}
}

/* Process B: `sock` < 0 answers from its own memory. */
static void handle_faults(int uffd, int sock)
{
	static uint8_t page[PAGE] __attribute__((aligned(4096)));
	struct uffd_msg messages[16];
	size_t n;

	memset(page, 0x5a, sizeof(page));
	while ((n = read_faults(uffd, messages, 16)) > 0) {
		for (size_t i = 0; i < n; i++) {
			uint64_t address = messages[i].arg.pagefault.address & ~(PAGE - 1);
			if (sock >= 0)
				ask_page(sock, address / PAGE, page);
			copy_in(uffd, address, page, PAGE);
		}
	}
}

static void run_on(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	NEED(sched_setaffinity(0, sizeof(set), &set) == 0);
}

static int host_cpu;

static pid_t begin_on_host(void)
{
	pid_t pid = begin_child();

	if (pid == 0)
		run_on(host_cpu);
	return pid;
}

static void measure_round_trip(const struct sockaddr_in *address, uint64_t *ns, size_t count)
{
	static uint8_t page[PAGE];
	int sock = connect_to(address);

	for (size_t i = 0; i < count; i++) {
		uint64_t began = now_ns();
		ask_page(sock, i, page);
		ns[i] = now_ns() - began;
	}
	close(sock);
}

/* Process A. With `address` pages come from C, without it from B. */
static void measure_faults(const struct sockaddr_in *address, uint64_t *ns, size_t count)
{
	size_t len = count * PAGE;
	uint8_t *memory = map_memory(len, true);
	int uffd = register_missing(memory, len);
	pid_t handler = begin_on_host();

	if (handler == 0)
		handle_faults(uffd, address ? connect_to(address) : -1);
	for (size_t i = 0; i < count; i++) {
		/* 7 shares no factor with count: every page once, none next to the one before. */
		volatile const uint8_t *page = memory + i * 7 % count * PAGE;
		uint64_t began = now_ns();
		uint8_t value = *page;
		ns[i] = now_ns() - began;
		NEED(value == 0x5a);
	}
	end_child(handler);
	close(uffd);
	munmap(memory, len);
}

int main(int argc, char **argv)
{
	size_t count = argc == 4 ? strtoul(argv[1], NULL, 10) : 0;
	struct sockaddr_in address;

	if (count == 0) {
		fprintf(stderr, "usage: floor FAULTS GUEST_CPU HOST_CPU\n");
		return 2;
	}
	run_on(atoi(argv[2]));
	host_cpu = atoi(argv[3]);
	/* So that i * 7 % count visits every page. */
	count += count % 7 == 0;
	uint64_t *ns = calloc(count, sizeof(*ns));
	int listener = listen_on(&address);
	NEED(ns);
	pid_t server = begin_on_host();
	if (server == 0)
		serve_pages(listener);
	measure_faults(&address, ns, count);
	printf("{\"fault_us\": ");
	print_percentiles(ns, count);
	measure_round_trip(&address, ns, count);
	printf(", \"round_trip_us\": ");
	print_percentiles(ns, count);
	measure_faults(NULL, ns, count);
	printf(", \"local_fault_us\": ");
	print_percentiles(ns, count);
	printf("}\n");
	end_child(server);
	return 0;
}
