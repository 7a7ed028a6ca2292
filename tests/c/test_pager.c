// sources: pager.c pager_install.c pager_request.c state.c ledger.c extents.c uffd.c histogram.c inflight.c waiters.c wire.c crash.c pager_exits.c exit_ring.c exit_ring_map.c checksum.c checksum_avx2.c
/* The pager over a kernel of this file's own: what a hostile VMM, a hostile source or a torn state memory could do. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "pager.h"

#define PAGES 96u	   /* of most machines here */
#define KERNEL_PAGES 4096u /* of the largest */
#define BASE 0x7f0000000000ull
#define QUEUE 40000u

/* The kernel's side. One VMM at a time; `fd` is not looked at. */
static struct {
	bool present[KERNEL_PAGES];
	uint8_t content[KERNEL_PAGES]; /* first byte of the page */
	uint32_t installs[KERNEL_PAGES], wakes[KERNEL_PAGES];
	uint64_t hva_of_last_wake;
	struct uffd_msg queue[QUEUE];
	uint32_t head, tail;
	int refuse;	     /* errno that every install answers, 0: none */
	int refuse_protect;  /* the same for unprotect */
	bool until_drained;  /* refuse only while messages are queued */
	bool changing;	     /* a call of the VMM's has not announced itself yet */
	uint32_t wake_calls, poisoned;
} kernel;

static struct uffd_result fake_install(int fd, enum uffd_op op, uint64_t dst, uint64_t src, uint64_t len_bytes)
{
	uint64_t first = (dst - BASE) / 4096, count = len_bytes / 4096;

	(void)fd;
	if (kernel.refuse && !(kernel.until_drained && kernel.head == kernel.tail))
		return uffd_classify(op, kernel.refuse, -kernel.refuse, len_bytes);
	if (dst < BASE || first + count > KERNEL_PAGES)
		return uffd_classify(op, ENOENT, -ENOENT, len_bytes);
	for (uint64_t i = 0; i < count; i++) {
		if (kernel.present[first + i])
			return uffd_classify(op, i ? EAGAIN : EEXIST, i ? (int64_t)i * 4096 : -EEXIST, len_bytes);
		kernel.present[first + i] = true;
		kernel.installs[first + i]++;
		kernel.poisoned += op == UFFD_OP_POISON;
		kernel.content[first + i] = op == UFFD_OP_COPY ? *(const uint8_t *)(uintptr_t)(src + i * 4096) : 0;
		kernel.wakes[first + i]++;
	}
	return uffd_classify(op, 0, (int64_t)len_bytes, len_bytes);
}

static int fake_wake(int fd, uint64_t start, uint64_t len_bytes)
{
	(void)fd;
	kernel.wake_calls++;
	kernel.hva_of_last_wake = start;
	for (uint64_t page = 0; page < KERNEL_PAGES; page++)
		if (BASE + page * 4096 - start < len_bytes)
			kernel.wakes[page]++;
	return 0;
}

static int fake_unprotect(int fd, uint64_t start, uint64_t len_bytes)
{
	(void)fd, (void)start, (void)len_bytes;
	return kernel.refuse_protect;
}

static int fake_unregister(int fd, uint64_t start, uint64_t len_bytes)
{
	(void)fd, (void)start, (void)len_bytes;
	return 0;
}

static ssize_t fake_read(int fd, struct uffd_msg *messages, size_t len_bytes)
{
	size_t n = 0;

	(void)fd;
	while (n < len_bytes / sizeof(*messages) && kernel.head != kernel.tail)
		messages[n++] = kernel.queue[kernel.head++ % QUEUE];
	return n ? (ssize_t)(n * sizeof(*messages)) : -EAGAIN;
}

static bool fake_is_changing(int fd, uint64_t start, uint64_t len_bytes)
{
	(void)fd, (void)len_bytes;
	CHECK_EQ(start, BASE);
	return kernel.changing || kernel.head != kernel.tail;
}

static const struct uffd_edge fake = {
	.install = fake_install,
	.wake = fake_wake,
	.unprotect = fake_unprotect,
	.unregister = fake_unregister,
	.read = fake_read,
	.is_changing = fake_is_changing,
};

static void queue(struct uffd_msg m)
{
	CHECK(kernel.tail - kernel.head < QUEUE);
	kernel.queue[kernel.tail++ % QUEUE] = m;
}

static void queue_fault(uint64_t hva, uint32_t tid, uint64_t flags)
{
	struct uffd_msg m = { .event = UFFD_EVENT_PAGEFAULT };

	m.arg.pagefault.address = hva;
	m.arg.pagefault.flags = flags;
	m.arg.pagefault.feat.ptid = tid;
	queue(m);
}

static void queue_range(uint8_t event, uint64_t start, uint64_t end)
{
	struct uffd_msg m = { .event = event };

	m.arg.remove.start = start;
	m.arg.remove.end = end;
	queue(m);
}

static void queue_remap(uint64_t from, uint64_t to, uint64_t len_bytes)
{
	struct uffd_msg m = { .event = UFFD_EVENT_REMAP };

	m.arg.remap.from = from;
	m.arg.remap.to = to;
	m.arg.remap.len = len_bytes;
	queue(m);
}

static uint64_t page_hva(uint64_t page)
{
	return BASE + page * 4096;
}

struct machine {
	void *state;
	uint64_t len_bytes;
	struct pager *pager;
};

static struct machine start_with(const struct region *regions, uint32_t count, uint64_t pages)
{
	struct machine m = { .len_bytes = pager_state_bytes(pages) };

	memset(&kernel, 0, sizeof(kernel));
	m.state = calloc(1, m.len_bytes);
	CHECK(m.state);
	m.pager = pager_create(m.state, m.len_bytes, regions, count, 5, &fake);
	CHECK(m.pager);
	return m;
}

/* Two regions without a gap between them in memory, with one in the image. */
static struct machine start(void)
{
	const struct region regions[] = {
		{ .hva = BASE, .len_bytes = 64 * 4096, .image_offset = 0, .page_shift = 12 },
		{ .hva = BASE + 64 * 4096, .len_bytes = 32 * 4096, .image_offset = 1 << 20, .page_shift = 12 },
	};

	return start_with(regions, 2, PAGES);
}

static void stop(struct machine *m)
{
	pager_destroy(m->pager);
	free(m->state);
}

static void crash_and_adopt(struct machine *m)
{
	pager_destroy(m->pager);
	m->pager = pager_adopt(m->state, m->len_bytes, 5, &fake);
	CHECK(m->pager);
}

/* The page source: content of a page is one byte, all through. */
static uint8_t source_byte(uint64_t offset)
{
	return (uint8_t)(offset / 4096 * 7 + 1);
}

static size_t put_varint(uint8_t *out, uint64_t value)
{
	size_t n = 0;

	for (; value >= 0x80; value >>= 7)
		out[n++] = (uint8_t)(value | 0x80);
	out[n++] = (uint8_t)value;
	return n;
}

struct asked {
	uint64_t id, offset, len_bytes;
};

/* Reads what wire_put_range wrote; the Python tests hold that against protobuf. */
static uint32_t read_request(const uint8_t *bytes, size_t len, struct asked *asked)
{
	uint32_t count = 0;

	for (size_t at = 0; at < len;) {
		uint64_t field[5] = { 0 };
		size_t end;

		CHECK_EQ(bytes[at], 0x12);
		end = at + 2 + bytes[at + 1];
		for (at += 2; at < end;) {
			unsigned number = bytes[at++] >> 3, shift = 0;

			CHECK(number < 5);
			do
				field[number] |= (uint64_t)(bytes[at] & 0x7f) << shift, shift += 7;
			while (bytes[at++] & 0x80);
		}
		asked[count++] = (struct asked){ field[1], field[2], field[3] };
	}
	return count;
}

static int answer_with(struct pager *p, struct asked a, bool right)
{
	uint8_t *data = malloc(a.len_bytes), *message = malloc(a.len_bytes + 128), body[80];
	size_t n = 0, head = 0;
	uint64_t sum;
	int result;

	CHECK(data && message);
	for (uint64_t i = 0; i < a.len_bytes; i++)
		data[i] = source_byte(a.offset + i);
	sum = XXH3_64bits_withSeed(data, a.len_bytes, a.offset) + !right;
	body[n++] = 0x08;
	n += put_varint(body + n, a.id);
	body[n++] = 0x10;
	n += put_varint(body + n, a.offset);
	body[n++] = 0x18;
	n += put_varint(body + n, a.len_bytes);
	body[n++] = 0x21;
	memcpy(body + n, &sum, 8);
	n += 8;
	body[n++] = 0x2a;
	n += put_varint(body + n, a.len_bytes);
	message[head++] = 0x0a;
	head += put_varint(message + head, n + a.len_bytes);
	memcpy(message + head, body, n);
	memcpy(message + head + n, data, a.len_bytes);
	result = pager_feed(p, message, head + n + a.len_bytes);
	free(data);
	free(message);
	return result;
}

static struct asked asked[512];

static uint32_t ask_demand(struct pager *p)
{
	static uint8_t out[16384];

	return read_request(out, pager_encode_demand(p, out, sizeof(out)), asked);
}

static uint32_t ask_bulk(struct pager *p, uint64_t want_bytes)
{
	static uint8_t out[16384];
	uint64_t claimed;

	return read_request(out, pager_encode_bulk(p, want_bytes, 1 << 16, out, sizeof(out), &claimed), asked);
}

/* A session's work until nothing is owed: push everything, answer everything. */
static void settle(struct machine *m)
{
	for (int round = 0; round < 50 && !pager_is_complete(m->pager); round++) {
		uint32_t n;

		pager_drain(m->pager);
		n = ask_demand(m->pager);
		for (uint32_t i = 0; i < n; i++)
			answer_with(m->pager, asked[i], true);
		n = ask_bulk(m->pager, 1 << 20);
		for (uint32_t i = 0; i < n; i++)
			answer_with(m->pager, asked[i], true);
		pager_retry(m->pager);
	}
	CHECK(pager_is_complete(m->pager));
}

static void a_fault_is_asked_for_installed_and_woken(void)
{
	struct machine m = start();

	queue_fault(page_hva(70) + 100, 9, 0);
	queue_fault(page_hva(70) + 200, 8, 0);
	CHECK(pager_drain(m.pager) & PAGER_SEND);
	CHECK_EQ(ask_demand(m.pager), 1);
	CHECK_EQ(asked[0].offset, (1 << 20) + 6 * 4096);
	CHECK_EQ(m.pager->waiters.count, 2);
	CHECK(answer_with(m.pager, asked[0], true) >= 0);
	CHECK_EQ(kernel.content[70], source_byte(asked[0].offset));
	CHECK_EQ(kernel.wakes[70], 1);
	CHECK_EQ(m.pager->waiters.count, 0);
	settle(&m);
	for (uint32_t i = 0; i < PAGES; i++)
		CHECK_EQ(kernel.installs[i], 1);
	stop(&m);
}

static void memory_that_moved_is_served_at_its_new_place(void)
{
	struct machine m = start();

	/* The fault at the new place comes ahead of the event that explains it. */
	queue_fault(page_hva(1000), 9, 0);
	queue_remap(page_hva(4), page_hva(1000), 4 * 4096);
	pager_drain(m.pager);
	CHECK_EQ(kernel.hva_of_last_wake, page_hva(1000));
	queue_fault(page_hva(1001), 9, 0);
	pager_drain(m.pager);
	CHECK_EQ(ask_demand(m.pager), 1);
	CHECK_EQ(asked[0].offset, 5 * 4096);
	stop(&m);
}

static void an_event_worked_twice_by_a_crash_does_no_harm(void)
{
	struct machine m = start();
	struct uffd_msg remap;

	queue_remap(page_hva(4), page_hva(80) + (1 << 30), 4 * 4096);
	remap = kernel.queue[kernel.head];
	pager_drain(m.pager);
	m.pager->inbox[3] = remap; /* died before it was crossed out */
	crash_and_adopt(&m);
	CHECK(!pager_is_complete(m.pager));
	CHECK_EQ(ask_bulk(m.pager, 1 << 20), 0); /* not before the inbox is worked off */
	pager_drain(m.pager);
	CHECK(extents_of_page(m.pager->extents, 5));
	CHECK_EQ(extent_hva(extents_of_page(m.pager->extents, 5), 5), page_hva(81) + (1 << 30));
	stop(&m);
}

static void a_removal_in_the_inbox_of_the_dead_keeps_content_away(void)
{
	struct machine m = start();

	m.pager->inbox[7] = (struct uffd_msg){ .event = UFFD_EVENT_REMOVE };
	m.pager->inbox[7].arg.remove.start = page_hva(10);
	m.pager->inbox[7].arg.remove.end = page_hva(12);
	crash_and_adopt(&m);
	settle(&m);
	CHECK(!kernel.present[10] && !kernel.present[11] && kernel.present[12]);
	CHECK_EQ(m.pager->ledger.count[PAGE_ZERO], 2);
	stop(&m);
}

static void more_waiters_than_the_table_holds_are_all_answered(void)
{
	struct machine m = start();

	/* One more than can be noted, then an event that every install waits for. */
	for (uint32_t i = 0; i < WAITERS_MAX + 1; i++)
		queue_fault(page_hva(i % 64), 1 + i / 64, 0);
	queue_range(UFFD_EVENT_REMOVE, page_hva(64), page_hva(65));
	kernel.refuse = EAGAIN;
	kernel.until_drained = true;
	while (kernel.head != kernel.tail)
		pager_drain(m.pager);
	CHECK_EQ(m.pager->waiters.count, WAITERS_MAX);
	settle(&m);
	/* The one without a place is woken too, when there is room: page 0 by its install and by the wake for all. */
	CHECK(kernel.wakes[0] >= 2);
	stop(&m);
}

/* Enough pages that some share a place in the table, so that taking one out moves others. */
static struct machine start_with_crowd(uint32_t waiting)
{
	const struct region region = { .hva = BASE, .len_bytes = KERNEL_PAGES * 4096ull, .page_shift = 12 };
	struct machine m = start_with(&region, 1, KERNEL_PAGES);
	static bool chosen[KERNEL_PAGES];
	uint64_t seed = waiting;

	memset(chosen, 0, sizeof(chosen));
	for (uint32_t i = 0; i < waiting;) {
		uint64_t page = next_random(&seed) % KERNEL_PAGES;

		if (chosen[page])
			continue;
		chosen[page] = true;
		queue_fault(page_hva(page), 1 + i++ % 7, 0);
	}
	while (kernel.head != kernel.tail)
		pager_drain(m.pager);
	CHECK_EQ(m.pager->waiters.count, waiting);
	return m;
}

static void a_retry_passes_nobody_over(void)
{
	struct machine m = start_with_crowd(1900);

	kernel.refuse = EAGAIN;
	queue_range(UFFD_EVENT_REMOVE, page_hva(0), page_hva(KERNEL_PAGES));
	CHECK(pager_drain(m.pager) & PAGER_STALLED);
	CHECK_EQ(m.pager->waiters.count, 1900);
	kernel.refuse = 0;
	/* One walk, and no signal to come again: so nobody may be left. */
	CHECK(!(pager_retry(m.pager) & PAGER_STALLED));
	CHECK_EQ(m.pager->waiters.count, 0);
	stop(&m);
}

static void a_hole_answers_everyone_who_waits_in_it(void)
{
	struct machine m = start_with_crowd(1900);

	CHECK(!(pager_mark_zero(m.pager, 0, KERNEL_PAGES * 4096ull) & PAGER_STALLED));
	CHECK_EQ(m.pager->waiters.count, 0);
	stop(&m);
}

static void a_refused_unprotect_makes_the_thread_ask_again(void)
{
	struct machine m = start();

	kernel.refuse_protect = EAGAIN;
	queue_fault(page_hva(3), 1, UFFD_PAGEFAULT_FLAG_WP);
	pager_drain(m.pager);
	CHECK_EQ(kernel.wakes[3], 1);
	stop(&m);
}

static void a_part_of_a_huge_page_is_not_removed(void)
{
	const struct region region = { .hva = BASE & ~((1ull << 21) - 1), .len_bytes = 4ull << 21, .page_shift = 21 };
	struct machine m = start_with(&region, 1, 4);

	/* MADV_REMOVE of [1 MiB, 5 MiB): only the second huge page is covered. */
	queue_range(UFFD_EVENT_REMOVE, region.hva + (1 << 20), region.hva + (5 << 20));
	pager_drain(m.pager);
	CHECK_EQ(ledger_state(&m.pager->ledger, 0), PAGE_MISSING);
	CHECK_EQ(ledger_state(&m.pager->ledger, 1), PAGE_ZERO);
	CHECK_EQ(ledger_state(&m.pager->ledger, 2), PAGE_MISSING);
	/* The same for what a pre-copy brought: half a page is none. */
	pager_mark_present(m.pager, 1 << 20, 4 << 20);
	CHECK_EQ(ledger_state(&m.pager->ledger, 0), PAGE_MISSING);
	CHECK_EQ(ledger_state(&m.pager->ledger, 2), PAGE_MISSING);
	pager_mark_present(m.pager, 4 << 20, 2 << 20);
	CHECK_EQ(ledger_state(&m.pager->ledger, 2), PAGE_PRESENT);
	/* An unmap that cuts a page means that the VMM named a wrong page size: no guessing. */
	queue_range(UFFD_EVENT_UNMAP, region.hva, region.hva + 4096);
	CHECK(pager_drain(m.pager) & PAGER_FAILED);
	CHECK_EQ(m.pager->failure.error, EINVAL);
	stop(&m);
}

static void a_new_stream_does_not_carry_the_blame_of_the_old(void)
{
	struct machine m = start();
	struct asked nobodys = { .id = 1 << 20, .offset = 0, .len_bytes = 4096 };
	int last = 0;

	for (int i = 0; i < 64; i++)
		last = answer_with(m.pager, nobodys, true);
	CHECK_EQ(last, -1);
	CHECK(pager_take_signals(m.pager) & PAGER_DISTRUST);
	pager_reset_lane(m.pager, LANE_BULK);
	pager_reset_lane(m.pager, LANE_DEMAND);
	CHECK(answer_with(m.pager, nobodys, true) >= 0);
	stop(&m);
}

static void a_bad_checksum_is_asked_for_again(void)
{
	struct machine m = start();

	queue_fault(page_hva(3), 1, 0);
	pager_drain(m.pager);
	CHECK_EQ(ask_demand(m.pager), 1);
	CHECK(answer_with(m.pager, asked[0], false) & PAGER_STALLED);
	CHECK(!kernel.present[3]);
	CHECK_EQ(m.pager->counters->bad_replies, 1);
	CHECK(pager_retry(m.pager) & PAGER_SEND);
	CHECK_EQ(ask_demand(m.pager), 1);
	answer_with(m.pager, asked[0], true);
	CHECK_EQ(kernel.content[3], source_byte(3 * 4096));
	stop(&m);
}

static void wanted_pages_without_a_slot_are_announced_when_one_is_free(void)
{
	const struct region region = { .hva = BASE, .len_bytes = 8192 * 4096ull, .page_shift = 12 };
	struct machine m = start_with(&region, 1, 8192);
	static uint8_t out[64 << 10];

	/* Every other page, so that none can be asked for together. */
	for (uint32_t i = 0; i < INFLIGHT_SLOTS + 1; i++)
		queue_fault(page_hva(i * 2), 1 + i, 0);
	while (kernel.head != kernel.tail)
		pager_drain(m.pager);
	CHECK(pager_encode_demand(m.pager, out, sizeof(out)) > 0);
	CHECK_EQ(m.pager->inflight.requests[LANE_DEMAND], INFLIGHT_SLOTS);
	CHECK_EQ(pager_encode_demand(m.pager, out, sizeof(out)), 0);
	pager_take_signals(m.pager);
	CHECK(answer_with(m.pager, (struct asked){ m.pager->inflight.slot[0].id, 0, 4096 }, true) & PAGER_SEND);
	CHECK_EQ(ask_demand(m.pager), 1);
	stop(&m);
}

static void a_forking_vmm_cannot_use_up_descriptors(void)
{
	struct machine m = start();
	int fd[FORKS_MAX + 1];
	unsigned signals = 0;

	for (uint32_t i = 0; i < FORKS_MAX + 1; i++) {
		struct uffd_msg fork = { .event = UFFD_EVENT_FORK };

		fd[i] = open("/dev/null", O_RDONLY | O_CLOEXEC);
		CHECK(fd[i] >= 0);
		fork.arg.fork.ufd = (uint32_t)fd[i];
		queue(fork);
		signals = pager_drain(m.pager);
		/* Open while the child may touch memory. */
		CHECK((fcntl(fd[i], F_GETFD) >= 0) == (i < FORKS_MAX));
	}
	CHECK(signals & PAGER_FAILED);
	stop(&m);
	for (uint32_t i = 0; i < FORKS_MAX; i++)
		CHECK(fcntl(fd[i], F_GETFD) < 0);
}

static void poison_settles_every_page_and_frees_who_waits(void)
{
	struct machine m = start_with_crowd(1900);

	CHECK(pager_poison_missing(m.pager));
	CHECK(kernel.poisoned >= 1900);
	CHECK(pager_is_complete(m.pager));
	CHECK_EQ(m.pager->waiters.count, 0);
	settle(&m);
	stop(&m);
}

static void a_fault_that_the_dead_had_read_holds_completion_back(void)
{
	struct machine m = start();

	settle(&m);
	m.pager->inbox[0] = (struct uffd_msg){ .event = UFFD_EVENT_PAGEFAULT };
	m.pager->inbox[0].arg.pagefault.address = page_hva(9);
	crash_and_adopt(&m);
	CHECK(!pager_is_complete(m.pager));
	kernel.wakes[9] = 0;
	pager_drain(m.pager);
	CHECK(kernel.wakes[9] > 0);
	CHECK(pager_is_complete(m.pager));
	stop(&m);
}

/* A removal that was on its way when the memory was unregistered: its thread waits until somebody reads it. */
static void a_removal_at_the_very_end_is_read(void)
{
	struct machine m = start();

	CHECK_EQ(pager_release(m.pager), 0);
	kernel.changing = true;
	CHECK(!pager_let_go(m.pager));
	for (uint64_t page = 0; page < PAGES; page++)
		queue_range(UFFD_EVENT_REMOVE, page_hva(page), page_hva(page + 1));
	kernel.changing = false;
	CHECK(pager_let_go(m.pager));
	CHECK_EQ(kernel.head, kernel.tail);
	stop(&m);
}

static void nonsense_regions_are_refused(void)
{
	static const struct region bad[] = {
		{ .hva = BASE, .len_bytes = 4096, .page_shift = 70 },
		{ .hva = BASE, .len_bytes = 4096, .page_shift = 0 },
		{ .hva = BASE, .len_bytes = 0, .page_shift = 12 },
		{ .hva = BASE + 1, .len_bytes = 4096, .page_shift = 12 },
		{ .hva = BASE, .len_bytes = 4097, .page_shift = 12 },
		{ .hva = BASE + 4096, .len_bytes = 1 << 21, .page_shift = 21 },
		{ .hva = UINT64_MAX & ~4095ull, .len_bytes = 8192, .page_shift = 12 },
		{ .hva = 4096, .len_bytes = UINT64_MAX & ~4095ull, .page_shift = 12 },
		{ .hva = BASE, .len_bytes = 8192, .image_offset = UINT64_MAX - 4095, .page_shift = 12 },
	};
	uint64_t len = pager_state_bytes(PAGES);
	void *state = calloc(1, len);

	CHECK(state);
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		CHECK(!pager_create(state, len, &bad[i], 1, 5, &fake));
		CHECK(!pager_adopt(state, len, 5, &fake));
	}
	CHECK(!pager_create(state, len, bad, 0, 5, &fake));
	CHECK(!pager_create(state, 100, bad, 1, 5, &fake));
	free(state);
}

/* Any state memory is either refused or worked on without an access that goes astray (the sanitizers see to that). */
static void corrupt_state_memory_is_refused_or_harmless(void)
{
	struct machine good = start();
	uint64_t seed = 77;
	uint32_t adopted = 0;
	uint64_t parts[5] = { 0, good.pager->state->regions_offset, good.pager->state->inbox_offset, 0,
			      good.pager->state->words_offset };
	static const uint64_t values[] = { 0, 1, 2, 12, 21, 63, 64, 4096, 1ull << 32, 1ull << 63, UINT64_MAX, UINT64_MAX - 4095 };

	queue_fault(page_hva(3), 1, 0);
	queue_range(UFFD_EVENT_UNMAP, page_hva(20), page_hva(24));
	pager_drain(good.pager);
	parts[3] = good.pager->state->extents_offset + 8 + good.pager->extents->current * sizeof(struct extent_table);
	for (int round = 0; round < 2000; round++) {
		struct machine m = { .state = malloc(good.len_bytes), .len_bytes = good.len_bytes };
		int changes = 1 + (int)(next_random(&seed) % 3);

		CHECK(m.state);
		memcpy(m.state, good.state, good.len_bytes);
		while (changes--) {
			uint64_t at = parts[next_random(&seed) % 5] + next_random(&seed) % 128;
			uint64_t value = next_random(&seed) % 3 ? values[next_random(&seed) % 12] : next_random(&seed);
			size_t len = 1ull << next_random(&seed) % 4;

			memcpy((char *)m.state + (at & ~(len - 1)), &value, len);
		}
		m.pager = pager_adopt(m.state, m.len_bytes, 5, &fake);
		if (m.pager) {
			adopted++;
			memset(kernel.present, 0, sizeof(kernel.present));
			kernel.head = kernel.tail;
			queue_fault(page_hva(next_random(&seed) % PAGES), 1, 0);
			queue_fault(page_hva(PAGES - 1), 1, 0);
			pager_drain(m.pager);
			for (uint32_t i = ask_demand(m.pager); i > 0; i--)
				if (asked[i - 1].len_bytes < 1 << 22)
					answer_with(m.pager, asked[i - 1], true);
			for (uint32_t i = ask_bulk(m.pager, 1 << 20); i > 0; i--)
				if (asked[i - 1].len_bytes < 1 << 22)
					answer_with(m.pager, asked[i - 1], true);
			pager_mark_zero(m.pager, 0, UINT64_MAX);
			pager_retry(m.pager);
			pager_destroy(m.pager);
		}
		free(m.state);
	}
	/* Both happened often, or this shows nothing. */
	CHECK(adopted > 200 && adopted < 1800);
	stop(&good);
}

static void cut_state_memory_is_refused(void)
{
	struct machine m = start();

	pager_destroy(m.pager);
	CHECK(!pager_adopt(m.state, m.len_bytes - 1, 5, &fake));
	CHECK(!pager_adopt(m.state, 8, 5, &fake));
	m.pager = pager_adopt(m.state, m.len_bytes, 5, &fake);
	CHECK(m.pager);
	stop(&m);
}

int main(void)
{
	a_fault_is_asked_for_installed_and_woken();
	memory_that_moved_is_served_at_its_new_place();
	an_event_worked_twice_by_a_crash_does_no_harm();
	a_removal_in_the_inbox_of_the_dead_keeps_content_away();
	more_waiters_than_the_table_holds_are_all_answered();
	a_retry_passes_nobody_over();
	a_hole_answers_everyone_who_waits_in_it();
	a_refused_unprotect_makes_the_thread_ask_again();
	a_part_of_a_huge_page_is_not_removed();
	a_new_stream_does_not_carry_the_blame_of_the_old();
	a_bad_checksum_is_asked_for_again();
	wanted_pages_without_a_slot_are_announced_when_one_is_free();
	a_forking_vmm_cannot_use_up_descriptors();
	poison_settles_every_page_and_frees_who_waits();
	a_fault_that_the_dead_had_read_holds_completion_back();
	a_removal_at_the_very_end_is_read();
	nonsense_regions_are_refused();
	corrupt_state_memory_is_refused_or_harmless();
	cut_state_memory_is_refused();
	return 0;
}
