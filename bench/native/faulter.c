/*
 * A VMM reduced to its memory: hands it over, touches it from threads when told to, times each touch and checks it.
 *
 *     faulter PAGES PERIOD DATA [cold]
 *
 * PAGES of memory, warmed unless `cold`. Of every PERIOD pages the first DATA begin with their index + 1 (u64), the
 * others are zero; a page that begins with anything else is counted as wrong. Commands are lines on standard input,
 * each answered by a line of JSON; it ends with its input.
 *
 *     handoff SOCKET           hand over as docs/protocol.md says (framed), wait for the acknowledgement
 *     touch THREADS COUNT [F]  each thread touches COUNT absent pages nobody touched yet, in random order; F: file for the
 *                              latencies (u64, ns), appended
 *     check                    touch every page that has data, and if PERIOD is small every other page too
 *
 * Memory that is `cold` can only be handed over and checked: a list of its pages would be as long as the bench.
 */
#include <pthread.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "bench.h"

#define SMALL_PERIOD 64

struct memory {
	uint8_t *start;
	size_t pages;
	size_t period, data;
	int uffd;
	int sock;
	uint32_t *order; /* a permutation of the pages */
	size_t touched;  /* so many of its entries are used up */
};

struct toucher {
	pthread_t thread;
	pthread_barrier_t *start;
	const struct memory *memory;
	const uint32_t *pages;
	size_t candidates, count;
	uint64_t *ns;
	size_t done, wrong;
	uint64_t began, ended;
};

static uint64_t expected(const struct memory *m, size_t page)
{
	return page % m->period < m->data ? page + 1 : 0;
}

static uint64_t first_word(const struct memory *m, size_t page)
{
	return *(volatile const uint64_t *)(m->start + page * PAGE);
}

/* Source: mincore(2); of anonymous memory it tells whether the page is there, and faults nothing in. */
static bool is_present(const struct memory *m, size_t page)
{
	unsigned char resident = 0;

	NEED(mincore(m->start + page * PAGE, PAGE, &resident) == 0);
	return resident & 1;
}

static void *touch_slice(void *argument)
{
	struct toucher *t = argument;

	pthread_barrier_wait(t->start);
	t->began = now_ns();
	for (size_t i = 0; i < t->candidates && t->done < t->count; i++) {
		size_t page = t->pages[i];
		/* The push was here already: that is no fault. */
		if (is_present(t->memory, page))
			continue;
		uint64_t began = now_ns();
		uint64_t word = first_word(t->memory, page);
		t->ns[t->done++] = now_ns() - began;
		t->wrong += word != expected(t->memory, page);
	}
	t->ended = now_ns();
	return NULL;
}

static void append(const char *path, const uint64_t *ns, size_t count)
{
	FILE *file = fopen(path, "ab");

	NEED(file && fwrite(ns, sizeof(*ns), count, file) == count && fclose(file) == 0);
}

static void run_touch(struct memory *m, size_t threads, size_t count, const char *path)
{
	/* Some more, as the push may be before us. With a lone thread all that is left is at hand. */
	size_t left = m->pages - m->touched, each = threads == 1 ? left : count + count / 8 + 8;
	struct toucher *touchers = calloc(threads, sizeof(*touchers));
	uint64_t *ns = calloc(threads * count, sizeof(*ns));
	pthread_barrier_t start;
	size_t done = 0, wrong = 0;
	uint64_t began = UINT64_MAX, ended = 0;

	NEED(touchers && ns && pthread_barrier_init(&start, NULL, (unsigned)threads) == 0);
	each = each * threads > left ? left / threads : each;
	for (size_t i = 0; i < threads; i++) {
		touchers[i] = (struct toucher){.start = &start, .memory = m, .pages = m->order + m->touched + i * each,
					       .candidates = each, .count = count, .ns = ns + i * count};
		NEED(pthread_create(&touchers[i].thread, NULL, touch_slice, &touchers[i]) == 0);
	}
	for (size_t i = 0; i < threads; i++) {
		pthread_join(touchers[i].thread, NULL);
		memmove(ns + done, touchers[i].ns, touchers[i].done * sizeof(*ns));
		done += touchers[i].done;
		wrong += touchers[i].wrong;
		began = touchers[i].began < began ? touchers[i].began : began;
		ended = touchers[i].ended > ended ? touchers[i].ended : ended;
	}
	/* A lone thread may be told again and again; what it skipped is present and would be skipped again. */
	m->touched += threads == 1 ? done : each * threads;
	if (path)
		append(path, ns, done);
	printf("{\"ok\": true, \"faults\": %zu, \"wrong\": %zu, \"wall_s\": %.6f, \"us\": ", done, wrong,
	       (double)(ended - began) / 1e9);
	print_percentiles(ns, done);
	printf("}\n");
	pthread_barrier_destroy(&start);
	free(touchers);
	free(ns);
}

static void run_check(const struct memory *m)
{
	size_t wrong = 0, checked = 0;

	for (size_t page = 0; page < m->pages; page++) {
		if (m->period > SMALL_PERIOD && page % m->period >= m->data)
			continue;
		wrong += first_word(m, page) != expected(m, page);
		checked++;
	}
	printf("{\"ok\": true, \"checked\": %zu, \"wrong\": %zu}\n", checked, wrong);
}

static void send_handoff(const struct memory *m)
{
	char json[512];
	int len = snprintf(json, sizeof(json),
			   "{\"type\":\"handoff\",\"version\":0,\"vmm_pid\":%d,\"mode\":\"MISSING\",\"regions\":"
			   "[{\"guest_phys_addr\":0,\"host_virt_addr\":%" PRIuPTR ",\"size\":%zu,\"backing_file_offset\":0}]}",
			   getpid(), (uintptr_t)m->start, m->pages * PAGE);
	uint32_t prefix = (uint32_t)len;
	struct iovec parts[] = {{&prefix, sizeof(prefix)}, {json, (size_t)len}};
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct msghdr message = {
		.msg_iov = parts, .msg_iovlen = 2, .msg_control = control.room, .msg_controllen = sizeof(control.room)};
	struct cmsghdr *rights = CMSG_FIRSTHDR(&message);

	rights->cmsg_level = SOL_SOCKET;
	rights->cmsg_type = SCM_RIGHTS;
	rights->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(rights), &m->uffd, sizeof(int));
	NEED(sendmsg(m->sock, &message, MSG_NOSIGNAL) == (ssize_t)(sizeof(prefix) + (size_t)len));
}

static void run_handoff(struct memory *m, const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	uint8_t answer = 0;

	NEED(strlen(path) < sizeof(address.sun_path));
	strcpy(address.sun_path, path);
	m->sock = socket(AF_UNIX, SOCK_STREAM, 0);
	NEED(m->sock >= 0 && connect(m->sock, (struct sockaddr *)&address, sizeof(address)) == 0);
	send_handoff(m);
	errno = 0;
	NEED(recv(m->sock, &answer, 1, 0) == 1 && answer == 1);
	printf("{\"ok\": true}\n");
}

static void shuffle(uint32_t *order, size_t count)
{
	uint64_t state = 88172645463325252u;

	for (size_t i = 0; i < count; i++)
		order[i] = (uint32_t)i;
	for (size_t i = count; i > 1; i--) {
		size_t j = next_random(&state) % i;
		uint32_t swapped = order[i - 1];
		order[i - 1] = order[j];
		order[j] = swapped;
	}
}

static void obey(struct memory *m, char *line)
{
	char path[256] = "";
	size_t threads, count;

	if (sscanf(line, "handoff %255s", path) == 1)
		run_handoff(m, path);
	else if (m->order && sscanf(line, "touch %zu %zu %255s", &threads, &count, path) >= 2 && threads > 0)
		run_touch(m, threads, count, *path ? path : NULL);
	else if (strcmp(line, "check\n") == 0)
		run_check(m);
	else
		printf("{\"ok\": false, \"error\": \"unknown command\"}\n");
	fflush(stdout);
}

int main(int argc, char **argv)
{
	char line[512];
	struct memory m = {.sock = -1};

	if (argc < 4) {
		fprintf(stderr, "usage: faulter PAGES PERIOD DATA [cold]\n");
		return 2;
	}
	m.pages = strtoul(argv[1], NULL, 10);
	m.period = strtoul(argv[2], NULL, 10);
	m.data = strtoul(argv[3], NULL, 10);
	errno = EINVAL;
	NEED(m.pages > 0 && m.pages <= UINT32_MAX && m.period > 0);
	m.start = map_memory(m.pages * PAGE, argc == 4);
	m.uffd = register_missing(m.start, m.pages * PAGE);
	if (argc == 4) {
		m.order = malloc(m.pages * sizeof(*m.order));
		NEED(m.order);
		shuffle(m.order, m.pages);
	}
	printf("{\"ok\": true, \"pid\": %d}\n", getpid());
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin))
		obey(&m, line);
	return 0;
}
