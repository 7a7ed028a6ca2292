// sources: exit_ring.c exit_ring_map.c exit_ring_vmm.c
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "exit_ring.h"
#include "exit_ring_vmm.h"

#define VCPUS 70u
#define PAGES 200u

struct pair {
	void *mem;
	size_t len;
	struct exit_ring_end vmm;
	struct exit_ring ring;
	struct exit_lane_end lane[VCPUS];
	struct exit_fault fault[64];
	unsigned count;
};

static struct pair pair;

static void format(void)
{
	memset(&pair, 0, sizeof(pair));
	pair.len = exit_ring_bytes(VCPUS, PAGES);
	pair.mem = aligned_alloc(4096, pair.len);
	memset(pair.mem, 0, pair.len);
	exit_ring_format(&pair.vmm, pair.mem, VCPUS, PAGES, false);
	for (uint32_t i = 0; i < VCPUS; i++)
		exit_lane_init(&pair.lane[i], &pair.vmm, i);
}

static void begin(void)
{
	format();
	CHECK_EQ(exit_ring_attach(&pair.ring, pair.mem, pair.len), EXIT_RING_OK);
}

static void end(void)
{
	exit_ring_detach(&pair.ring);
	free(pair.mem);
}

static int drain(unsigned max)
{
	return exit_ring_drain(&pair.ring, pair.fault, max, &pair.count);
}

static void complete(const struct exit_fault *fault)
{
	CHECK_EQ(exit_ring_complete(&pair.ring, fault->vcpu, fault->gpa, fault->sequence, EXIT_RESOLVED), EXIT_RING_OK);
}

static void post(uint32_t vcpu, uint32_t count)
{
	uint64_t gpa[EXIT_RING_ENTRIES];

	for (uint32_t i = 0; i < count; i++)
		gpa[i] = (uint64_t)(vcpu * 100 + i) << 12;
	exit_lane_post(&pair.lane[vcpu], gpa, count, EXIT_FAULT_READ);
}

static void a_batch_is_answered_in_any_order_and_ends_with_its_last_answer(void)
{
	begin();
	post(65, 3);
	CHECK_EQ(drain(64), EXIT_RING_OK);
	CHECK_EQ(pair.count, 3);
	for (int i = 2; i >= 0; i--) {
		CHECK_EQ(exit_lane_collect(&pair.lane[65]), EXIT_LANE_WAITING);
		CHECK_EQ(pair.fault[i].gpa, (6500 + (uint64_t)i) << 12);
		CHECK_EQ(pair.fault[i].vcpu, 65);
		CHECK_EQ(pair.fault[i].flags, EXIT_FAULT_READ);
		complete(&pair.fault[i]);
	}
	CHECK_EQ(exit_lane_collect(&pair.lane[65]), EXIT_LANE_IDLE);
	CHECK_EQ(drain(64), EXIT_RING_OK);
	CHECK_EQ(pair.count, 0);
	end();
}

static void indices_run_through_the_end_of_32_bits(void)
{
	format();
	pair.lane[3].sequence = 0x1fffffff8ull;
	pair.lane[3].lane->fault_head = pair.lane[3].lane->done_tail = pair.lane[3].lane->done_head = 0xfffffff8u;
	CHECK_EQ(exit_ring_attach(&pair.ring, pair.mem, pair.len), EXIT_RING_OK);
	for (int round = 0; round < 5; round++) {
		post(3, EXIT_RING_ENTRIES);
		CHECK_EQ(drain(64), EXIT_RING_OK);
		CHECK_EQ(pair.count, EXIT_RING_ENTRIES);
		for (unsigned i = 0; i < pair.count; i++)
			complete(&pair.fault[i]);
		CHECK_EQ(exit_lane_collect(&pair.lane[3]), EXIT_LANE_IDLE);
	}
	CHECK_EQ(pair.lane[3].sequence, 0x1fffffff8ull + 5 * EXIT_RING_ENTRIES);
	end();
}

static void one_vcpu_rings_for_all_and_only_when_asked(void)
{
	uint64_t gpa = 4096;

	begin();
	while (!exit_ring_arm(&pair.ring))
		CHECK_EQ(drain(64), EXIT_RING_OK);
	CHECK(exit_lane_post(&pair.lane[0], &gpa, 1, 0));
	CHECK(!exit_lane_post(&pair.lane[1], &gpa, 1, 0));
	CHECK(!exit_ring_arm(&pair.ring));
	CHECK(!exit_lane_post(&pair.lane[2], &gpa, 1, 0));
	CHECK_EQ(drain(64), EXIT_RING_OK);
	CHECK_EQ(pair.count, 3);
	CHECK(exit_ring_arm(&pair.ring));
	end();
}

static void a_vcpu_that_posts_without_end_does_not_hold_up_the_others(void)
{
	unsigned seen[VCPUS] = { 0 }, drains = 0;

	begin();
	for (uint32_t vcpu = 0; vcpu < VCPUS; vcpu++)
		post(vcpu, 3);
	while (seen[VCPUS - 1] < 3) {
		CHECK(++drains <= VCPUS * 3);
		CHECK_EQ(drain(2), EXIT_RING_OK);
		for (unsigned f = 0; f < pair.count; f++) {
			seen[pair.fault[f].vcpu]++;
			complete(&pair.fault[f]);
		}
		if (exit_lane_collect(&pair.lane[0]) == EXIT_LANE_IDLE)
			post(0, 3);
	}
	for (uint32_t vcpu = 1; vcpu < VCPUS; vcpu++)
		CHECK_EQ(seen[vcpu], 3);
	end();
}

/* What a daemon that died had taken is delivered again, and only what it had not answered. */
static void the_next_daemon_is_given_what_the_last_one_owed(void)
{
	struct exit_ring next;

	begin();
	post(7, 4);
	post(8, 2);
	post(9, 1);
	CHECK_EQ(drain(64), EXIT_RING_OK);
	CHECK_EQ(pair.count, 7);
	complete(&pair.fault[2]); /* vCPU 7, third */
	complete(&pair.fault[0]); /* vCPU 7, first */
	complete(&pair.fault[4]); /* vCPU 8, both */
	complete(&pair.fault[5]);
	exit_ring_detach(&pair.ring);

	CHECK_EQ(exit_ring_attach(&next, pair.mem, pair.len), EXIT_RING_OK);
	pair.ring = next;
	CHECK_EQ(exit_lane_collect(&pair.lane[8]), EXIT_LANE_IDLE);
	post(8, 5); /* before the new daemon has looked at the lane */
	CHECK_EQ(drain(64), EXIT_RING_OK);
	CHECK_EQ(pair.count, 2 + 5 + 1);
	CHECK_EQ(pair.fault[0].gpa, 701u << 12);
	CHECK_EQ(pair.fault[1].gpa, 703u << 12);
	CHECK_EQ(pair.fault[2].gpa, 800u << 12);
	CHECK_EQ(pair.fault[7].gpa, 900u << 12);
	for (unsigned i = 0; i < pair.count; i++)
		complete(&pair.fault[i]);
	for (uint32_t vcpu = 7; vcpu < 10; vcpu++)
		CHECK_EQ(exit_lane_collect(&pair.lane[vcpu]), EXIT_LANE_IDLE);
	post(7, 16);
	CHECK_EQ(drain(64), EXIT_RING_OK);
	CHECK_EQ(pair.count, 16);
	end();
}

static void completing_what_is_not_owed_changes_nothing(void)
{
	begin();
	post(1, 1);
	CHECK_EQ(exit_ring_complete(&pair.ring, 1, 100u << 12, 0, 0), EXIT_RING_NOT_OWED);
	CHECK_EQ(drain(64), EXIT_RING_OK);
	CHECK_EQ(exit_ring_complete(&pair.ring, 1, 101u << 12, 0, 0), EXIT_RING_NOT_OWED);
	CHECK_EQ(exit_ring_complete(&pair.ring, 1, 100u << 12, 16, 0), EXIT_RING_NOT_OWED);
	CHECK_EQ(exit_ring_complete(&pair.ring, 2, 100u << 12, 0, 0), EXIT_RING_NOT_OWED);
	CHECK_EQ(exit_ring_complete(&pair.ring, VCPUS, 100u << 12, 0, 0), EXIT_RING_NOT_OWED);
	complete(&pair.fault[0]);
	CHECK_EQ(exit_ring_complete(&pair.ring, 1, 100u << 12, 0, 0), EXIT_RING_NOT_OWED);
	CHECK_EQ(exit_lane_collect(&pair.lane[1]), EXIT_LANE_IDLE);
	end();
}

/* Each lie ends with the error that names it. */
static void a_vmm_that_lies_is_found_out(void)
{
	begin(); /* an index jumps */
	pair.lane[0].lane->fault_head = 17;
	pair.vmm.header->pending[0] = 1;
	CHECK_EQ(drain(64), EXIT_RING_INDEX);
	end();

	begin(); /* 2^32 - 1 faults at once: the index goes backwards */
	pair.lane[0].lane->fault_head = UINT32_MAX;
	pair.vmm.header->pending[0] = 1;
	CHECK_EQ(drain(64), EXIT_RING_INDEX);
	end();

	begin(); /* answers are never taken */
	post(0, 16);
	CHECK_EQ(drain(64), EXIT_RING_OK);
	for (unsigned i = 0; i < pair.count; i++)
		complete(&pair.fault[i]);
	pair.lane[0].lane->fault_head = 17;
	pair.vmm.header->pending[0] = 1;
	CHECK_EQ(drain(64), EXIT_RING_INDEX);
	end();

	begin(); /* a batch is let go before it is answered */
	post(0, 4);
	CHECK_EQ(drain(64), EXIT_RING_OK);
	complete(&pair.fault[0]);
	pair.lane[0].lane->done_tail = 4;
	pair.vmm.header->pending[0] = 1;
	CHECK_EQ(drain(64), EXIT_RING_INDEX);
	end();

	begin(); /* a vCPU that was not announced */
	pair.vmm.header->pending[1] = 1ull << (VCPUS - 64);
	CHECK_EQ(drain(64), EXIT_RING_VCPU);
	end();

	begin();
	pair.vmm.header->pending[EXIT_RING_PENDING_WORDS - 1] = 1;
	CHECK_EQ(drain(64), EXIT_RING_VCPU);
	end();
}

static void a_record_that_contradicts_itself_is_found_out(void)
{
	static const struct {
		uint64_t gpa, sequence;
		uint32_t flags, vcpu;
		int error;
	} record[] = {
		{ 4097, 0, 0, 5, EXIT_RING_RECORD },  { 4096, 1, 0, 5, EXIT_RING_RECORD },
		{ 4096, 16, 0, 5, EXIT_RING_RECORD }, { 4096, 0, 8, 5, EXIT_RING_RECORD },
		{ 4096, 0, 0, 6, EXIT_RING_VCPU },    { 4096, 0, 0, UINT32_MAX, EXIT_RING_VCPU },
	};

	for (size_t i = 0; i < sizeof(record) / sizeof(record[0]); i++) {
		begin();
		post(5, 2);
		pair.lane[5].lane->fault[0] = (struct exit_ring_fault){ .gpa = record[i].gpa, .sequence = record[i].sequence,
									.flags = record[i].flags, .vcpu = record[i].vcpu };
		CHECK_EQ(drain(64), record[i].error);
		CHECK_EQ(pair.count, 0);
		end();
	}
}

/* The VMM believes the daemon no more than it must. */
static void a_daemon_that_lies_is_found_out(void)
{
	static const struct exit_ring_completion lie[] = {
		{ .gpa = 1, .sequence = 0, .vcpu = 2 },
		{ .gpa = 200u << 12, .sequence = 1, .vcpu = 2 },
		{ .gpa = 200u << 12, .sequence = 7, .vcpu = 2 },
		{ .gpa = 200u << 12, .sequence = 0, .vcpu = 3 },
		{ .gpa = 200u << 12, .sequence = 0, .vcpu = 2, .status = EXIT_STATUSES },
	};

	for (size_t i = 0; i < sizeof(lie) / sizeof(lie[0]); i++) {
		begin();
		post(2, 2);
		pair.lane[2].lane->completion[0] = lie[i];
		pair.lane[2].lane->done_head = 1;
		CHECK_EQ(exit_lane_collect(&pair.lane[2]), EXIT_LANE_BROKEN);
		end();
	}
	begin();
	post(2, 2);
	pair.lane[2].lane->done_head = 3;
	CHECK_EQ(exit_lane_collect(&pair.lane[2]), EXIT_LANE_BROKEN);
	pair.lane[2].lane->done_head = UINT32_MAX;
	CHECK_EQ(exit_lane_collect(&pair.lane[2]), EXIT_LANE_BROKEN);
	end();
}

static void try_geometry(size_t at, uint64_t value, unsigned bytes, int error)
{
	format();
	memcpy((char *)pair.mem + at, &value, bytes);
	CHECK_EQ(exit_ring_attach(&pair.ring, pair.mem, pair.len), error);
	free(pair.mem);
}

#define FIELD(name) offsetof(struct exit_ring_header, name)

static void no_geometry_leads_outside(void)
{
	size_t len = exit_ring_bytes(VCPUS, PAGES);

	try_geometry(FIELD(magic), 0, 8, EXIT_RING_NOT_RING);
	try_geometry(FIELD(version), 2, 4, EXIT_RING_OTHER_VERSION);
	try_geometry(FIELD(features), 4, 8, EXIT_RING_OTHER_FEATURES);
	try_geometry(FIELD(total_bytes), len + 1, 8, EXIT_RING_TOO_SMALL);
	try_geometry(FIELD(total_bytes), UINT64_MAX, 8, EXIT_RING_TOO_SMALL);
	try_geometry(FIELD(total_bytes), 1024, 8, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(vcpus), 0, 4, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(vcpus), EXIT_RING_VCPUS_MAX + 1, 4, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(vcpus), VCPUS + 4, 4, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(entries), 32, 4, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(lane_bytes), 0, 4, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(lane_bytes), sizeof(struct exit_ring_lane) + 1, 4, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(lane_bytes), UINT32_MAX & ~63u, 4, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(lane_offset), 0, 8, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(lane_offset), 1025, 8, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(lane_offset), UINT64_MAX - 63, 8, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(residency_offset), 1024, 8, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(residency_offset), len, 8, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(residency_offset), UINT64_MAX - 63, 8, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(residency_pages), UINT64_MAX, 8, EXIT_RING_BAD_GEOMETRY);
	try_geometry(FIELD(residency_pages), EXIT_RING_RESIDENCY_MAX, 8, EXIT_RING_BAD_GEOMETRY);
	format();
	CHECK_EQ(exit_ring_attach(&pair.ring, pair.mem, sizeof(struct exit_ring_header) - 1), EXIT_RING_TOO_SMALL);
	CHECK_EQ(exit_ring_attach(&pair.ring, pair.mem, pair.len - 1), EXIT_RING_TOO_SMALL);
	free(pair.mem);
}

static void a_lane_left_in_an_impossible_state_is_not_adopted(void)
{
	static const uint32_t head_tail_done[][3] = { { 17, 0, 0 }, { 1, 0, 2 }, { 0, 1, 0 }, { 4, 0, UINT32_MAX } };

	for (size_t i = 0; i < sizeof(head_tail_done) / sizeof(head_tail_done[0]); i++) {
		format();
		pair.lane[9].lane->fault_head = head_tail_done[i][0];
		pair.lane[9].lane->done_tail = head_tail_done[i][1];
		pair.lane[9].lane->done_head = head_tail_done[i][2];
		CHECK_EQ(exit_ring_attach(&pair.ring, pair.mem, pair.len), EXIT_RING_INDEX);
		free(pair.mem);
	}
	format(); /* two answers to one fault */
	pair.lane[9].lane->fault_head = 4;
	pair.lane[9].lane->done_head = 2;
	CHECK_EQ(exit_ring_attach(&pair.ring, pair.mem, pair.len), EXIT_RING_INDEX);
	free(pair.mem);
}

static void marks_are_seen_page_by_page(void)
{
	begin();
	exit_ring_mark(&pair.ring, 60, 10, true);
	exit_ring_mark(&pair.ring, 63, 2, false);
	for (uint64_t page = 0; page < PAGES + 100; page++)
		CHECK_EQ(exit_ring_is_resident(&pair.vmm, page), page >= 60 && page < 70 && page != 63 && page != 64);
	exit_ring_mark(&pair.ring, 190, UINT64_MAX, true);
	exit_ring_mark(&pair.ring, UINT64_MAX, 2, true);
	CHECK(exit_ring_is_resident(&pair.vmm, 199));
	CHECK(!exit_ring_is_resident(&pair.vmm, 200));
	CHECK(!exit_ring_is_complete(&pair.vmm));
	exit_ring_set_complete(&pair.ring);
	CHECK(exit_ring_is_complete(&pair.vmm));
	end();
	format(); /* without a daemon that serves the bitmap nothing is known */
	((uint64_t *)pair.vmm.residency)[0] = ~0ull;
	CHECK(!exit_ring_is_resident(&pair.vmm, 0));
	free(pair.mem);
}

/* FUTEX_WAIT compares the word with what doze returned: every reason to wake must have changed it. */
static void begin_local(void)
{
	format();
	pair.vmm.header->features |= EXIT_RING_LOCAL;
	CHECK_EQ(exit_ring_attach(&pair.ring, pair.mem, pair.len), EXIT_RING_OK);
}

static void nobody_installs_before_it_is_allowed(void)
{
	begin_local();
	CHECK(!exit_lane_enter(&pair.lane[3]));
	CHECK(!exit_lane_leave(&pair.lane[3]));
	CHECK(exit_ring_hold(&pair.ring));
	exit_ring_open(&pair.ring);
	CHECK(!exit_lane_enter(&pair.lane[3]));
	exit_lane_leave(&pair.lane[3]);
	exit_ring_allow_local(&pair.ring);
	CHECK(!exit_lane_enter(&pair.lane[3])); /* held until the daemon has looked */
	CHECK(exit_lane_leave(&pair.lane[3]));
	exit_ring_open(&pair.ring);
	CHECK(exit_lane_enter(&pair.lane[3]));
	CHECK(!exit_lane_leave(&pair.lane[3]));
	end();
	begin(); /* without the feature */
	exit_ring_allow_local(&pair.ring);
	exit_ring_open(&pair.ring);
	CHECK(!exit_lane_enter(&pair.lane[3]));
	exit_lane_leave(&pair.lane[3]);
	end();
}

static void who_installs_holds_the_reader_up_and_says_when_it_is_done(void)
{
	begin_local();
	exit_ring_allow_local(&pair.ring);
	exit_ring_open(&pair.ring);
	CHECK(exit_lane_enter(&pair.lane[0]));
	CHECK(exit_lane_enter(&pair.lane[VCPUS - 1]));
	CHECK(!exit_ring_hold(&pair.ring));
	CHECK(!exit_lane_enter(&pair.lane[1])); /* from now on nobody begins */
	CHECK(exit_lane_leave(&pair.lane[1]));
	CHECK(exit_lane_leave(&pair.lane[0]));
	CHECK(!exit_ring_hold(&pair.ring));
	CHECK(exit_lane_leave(&pair.lane[VCPUS - 1]));
	CHECK(exit_ring_hold(&pair.ring));
	end();
}

static void what_was_shut_stays_shut_for_the_next_daemon(void)
{
	begin_local();
	exit_ring_allow_local(&pair.ring);
	exit_ring_open(&pair.ring);
	CHECK(exit_lane_enter(&pair.lane[5]));
	exit_ring_detach(&pair.ring); /* it died; the next one goes on with it, and looks first */
	CHECK_EQ(exit_ring_attach(&pair.ring, pair.mem, pair.len), EXIT_RING_OK);
	CHECK(!exit_ring_hold(&pair.ring));
	CHECK(exit_lane_leave(&pair.lane[5]));
	CHECK(exit_ring_hold(&pair.ring));
	exit_ring_shut(&pair.ring);
	exit_ring_open(&pair.ring);
	CHECK(!exit_lane_enter(&pair.lane[5]));
	CHECK(!exit_lane_leave(&pair.lane[5]));
	exit_ring_detach(&pair.ring);
	CHECK_EQ(exit_ring_attach(&pair.ring, pair.mem, pair.len), EXIT_RING_OK);
	exit_ring_allow_local(&pair.ring);
	exit_ring_open(&pair.ring);
	CHECK(!exit_lane_enter(&pair.lane[5]));
	end();
}

static void between_doze_and_sleep_every_reason_to_wake_is_seen(void)
{
	uint32_t word;

	begin();
	word = exit_lane_doze(&pair.lane[4]);
	CHECK_EQ(pair.lane[4].lane->wake, word);
	exit_lane_nudge(&pair.lane[4]);
	CHECK(pair.lane[4].lane->wake != word);
	post(4, 1);
	word = exit_lane_doze(&pair.lane[4]);
	CHECK_EQ(drain(64), EXIT_RING_OK);
	CHECK(!exit_lane_has_news(&pair.lane[4]));
	complete(&pair.fault[0]);
	CHECK(exit_lane_has_news(&pair.lane[4]));
	CHECK(pair.lane[4].lane->wake != word);
	word = exit_lane_doze(&pair.lane[4]);
	exit_ring_set_complete(&pair.ring);
	CHECK(pair.lane[4].lane->wake != word);
	end();
}

static int sealed(unsigned flags, int seals, off_t len)
{
	int fd = memfd_create("ring", MFD_CLOEXEC | MFD_ALLOW_SEALING | flags);

	CHECK(fd >= 0);
	CHECK_EQ(ftruncate(fd, len), 0);
	CHECK_EQ(fcntl(fd, F_ADD_SEALS, seals), 0);
	return fd;
}

static void only_what_cannot_be_cut_off_is_mapped(void)
{
	const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
	size_t len;
	void *mem;
	int pipe_fd[2];

	CHECK_EQ(exit_ring_map(sealed(0, seals, 8192), &mem, &len), EXIT_RING_OK);
	CHECK_EQ(len, 8192);
	exit_ring_unmap(mem, len);
	CHECK_EQ(exit_ring_map(sealed(0, F_SEAL_GROW | F_SEAL_SEAL, 8192), &mem, &len), EXIT_RING_NOT_SEALED);
	CHECK_EQ(exit_ring_map(sealed(0, F_SEAL_SHRINK | F_SEAL_GROW, 8192), &mem, &len), EXIT_RING_NOT_SEALED);
	CHECK_EQ(exit_ring_map(sealed(0, seals | F_SEAL_WRITE, 8192), &mem, &len), EXIT_RING_NOT_MEMFD);
	CHECK_EQ(exit_ring_map(sealed(0, seals, 767), &mem, &len), EXIT_RING_TOO_SMALL);
	CHECK_EQ(exit_ring_map(sealed(0, seals, 0), &mem, &len), EXIT_RING_TOO_SMALL);
	CHECK_EQ(exit_ring_map(sealed(0, seals, 1ll << 40), &mem, &len), EXIT_RING_TOO_SMALL);
	/* A hugetlb page that cannot be had is SIGBUS. None has to be free to make the file. */
	CHECK_EQ(exit_ring_map(sealed(MFD_HUGETLB, seals, 2 << 20), &mem, &len), EXIT_RING_NOT_MEMFD);
	CHECK_EQ(pipe(pipe_fd), 0);
	CHECK_EQ(exit_ring_map(pipe_fd[0], &mem, &len), EXIT_RING_NOT_MEMFD);
	CHECK_EQ(exit_ring_map(-1, &mem, &len), EXIT_RING_NOT_MEMFD);
}

static void emptying_a_blocking_doorbell_does_not_block(void)
{
	int doorbell = eventfd(3, EFD_CLOEXEC), closed_pipe[2];

	CHECK(exit_ring_quiet(doorbell));
	CHECK(exit_ring_quiet(doorbell)); /* empty, and without O_NONBLOCK */
	close(doorbell);
	CHECK_EQ(pipe(closed_pipe), 0);
	close(closed_pipe[1]);
	CHECK(!exit_ring_quiet(closed_pipe[0]));
}

int main(void)
{
	a_batch_is_answered_in_any_order_and_ends_with_its_last_answer();
	indices_run_through_the_end_of_32_bits();
	one_vcpu_rings_for_all_and_only_when_asked();
	a_vcpu_that_posts_without_end_does_not_hold_up_the_others();
	the_next_daemon_is_given_what_the_last_one_owed();
	completing_what_is_not_owed_changes_nothing();
	a_vmm_that_lies_is_found_out();
	a_record_that_contradicts_itself_is_found_out();
	a_daemon_that_lies_is_found_out();
	no_geometry_leads_outside();
	a_lane_left_in_an_impossible_state_is_not_adopted();
	marks_are_seen_page_by_page();
	nobody_installs_before_it_is_allowed();
	who_installs_holds_the_reader_up_and_says_when_it_is_done();
	what_was_shut_stays_shut_for_the_next_daemon();
	between_doze_and_sleep_every_reason_to_wake_is_seen();
	only_what_cannot_be_cut_off_is_mapped();
	emptying_a_blocking_doorbell_does_not_block();
	return 0;
}
