// sources: pager.c pager_install.c pager_request.c state.c ledger.c extents.c uffd.c histogram.c inflight.c waiters.c wire.c crash.c pager_exits.c exit_ring.c exit_ring_map.c checksum.c checksum_avx2.c exit_ring_vmm.c
/* The pager and an exit ring: what vCPUs post, what they are answered, what another pager finds. The kernel is this file's. */
#include <errno.h>
#include <string.h>

#include "check.h"
#include "exit_ring_vmm.h"
#include "pager.h"

#define BASE 0x7f0000000000ull
#define GPA (4ull << 30)
#define PAGES 64u
#define HUGE_SHIFT 21u
#define VCPUS_MAX 512u

static struct {
	uint32_t installs, zeros, wakes;
	struct uffd_msg next; /* event 0: none */
} kernel;

static struct uffd_result fake_install(int fd, enum uffd_op op, uint64_t dst, uint64_t src, uint64_t len_bytes)
{
	(void)fd, (void)dst, (void)src;
	kernel.installs++;
	kernel.zeros += op == UFFD_OP_ZEROPAGE;
	return uffd_classify(op, 0, (int64_t)len_bytes, len_bytes);
}

static int fake_range(int fd, uint64_t start, uint64_t len_bytes)
{
	(void)fd, (void)start, (void)len_bytes;
	kernel.wakes++;
	return 0;
}

static ssize_t fake_read(int fd, struct uffd_msg *messages, size_t len_bytes)
{
	(void)fd;
	if (!kernel.next.event || len_bytes < sizeof(*messages))
		return -EAGAIN;
	*messages = kernel.next;
	kernel.next.event = 0;
	return sizeof(*messages);
}

static const struct uffd_edge fake = { fake_install, fake_range, fake_range, fake_range, fake_read, NULL, NULL };

/* A VM with one region, its ring, and the pager that serves it. */
struct vm {
	uint64_t page_size;
	uint64_t state_len;
	void *state, *ring;
	size_t ring_len;
	struct exit_ring_end end;
	struct exit_lane_end lane[VCPUS_MAX];
	struct pager *pager;
	uint8_t *content;
};

static void *zeroed(size_t len)
{
	void *mem = aligned_alloc(4096, (len + 4095) & ~4095ull);

	CHECK(mem != NULL);
	return memset(mem, 0, (len + 4095) & ~4095ull);
}

static void vm_init(struct vm *vm, uint32_t vcpus, uint32_t page_shift)
{
	const struct region region = { BASE, (uint64_t)PAGES << page_shift, 0, 0, GPA, page_shift, 0 };
	uint64_t pages = (uint64_t)PAGES << (page_shift - 12);

	memset(&kernel, 0, sizeof(kernel));
	memset(vm, 0, sizeof(*vm));
	vm->page_size = 1ull << page_shift;
	vm->state_len = pager_state_bytes(PAGES);
	vm->state = zeroed(vm->state_len);
	vm->ring_len = exit_ring_bytes(vcpus, pages);
	vm->ring = zeroed(vm->ring_len);
	vm->content = zeroed(vm->page_size);
	exit_ring_format(&vm->end, vm->ring, vcpus, pages, false);
	for (uint32_t i = 0; i < vcpus; i++)
		exit_lane_init(&vm->lane[i], &vm->end, i);
	vm->pager = pager_create(vm->state, vm->state_len, &region, 1, 3, &fake);
	CHECK(vm->pager != NULL);
	CHECK_EQ(pager_attach_ring(vm->pager, vm->ring, vm->ring_len, false), 0);
}

static void vm_deinit(struct vm *vm)
{
	pager_destroy(vm->pager);
	free(vm->state);
	free(vm->ring);
	free(vm->content);
}

/* The process ends, another one takes over what it left. */
static void vm_restart(struct vm *vm)
{
	pager_destroy(vm->pager);
	vm->pager = pager_adopt(vm->state, vm->state_len, 3, &fake);
	CHECK(vm->pager != NULL);
	CHECK_EQ(pager_attach_ring(vm->pager, vm->ring, vm->ring_len, false), 0);
}

static void post(struct vm *vm, uint32_t vcpu, uint64_t gpa)
{
	exit_lane_post(&vm->lane[vcpu], &gpa, 1, EXIT_FAULT_READ);
}

static void arrive(struct vm *vm, uint64_t page)
{
	pager_install(vm->pager, LANE_DEMAND, page, 1, vm->content);
}

static uint64_t waiting(const struct vm *vm)
{
	struct pager_stats stats;

	pager_get_stats(vm->pager, &stats);
	return stats.waiting;
}

static void a_fault_is_asked_for_and_answered(void)
{
	struct vm vm;

	vm_init(&vm, 2, 12);
	post(&vm, 1, GPA + 5 * 4096);
	CHECK(pager_drain(vm.pager) & PAGER_SEND);
	CHECK_EQ(ledger_state(&vm.pager->ledger, 5), PAGE_REQUESTED);
	CHECK_EQ(exit_lane_collect(&vm.lane[1]), EXIT_LANE_WAITING);
	CHECK(!exit_ring_is_resident(&vm.end, 5));
	arrive(&vm, 5);
	CHECK(exit_ring_is_resident(&vm.end, 5));
	CHECK_EQ(exit_lane_collect(&vm.lane[1]), EXIT_LANE_IDLE);
	CHECK_EQ(waiting(&vm), 0);
	vm_deinit(&vm);
}

static void a_fault_outside_of_memory_breaks_the_ring(void)
{
	static const uint64_t places[] = { GPA - 4096, GPA + PAGES * 4096, 0, UINT64_MAX & ~4095ull };

	for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
		struct vm vm;

		vm_init(&vm, 1, 12);
		post(&vm, 0, places[i]);
		CHECK(pager_drain(vm.pager) & PAGER_RING_BROKEN);
		CHECK_EQ((uint64_t)vm.pager->ring_error, (uint64_t)EXIT_RING_OUTSIDE);
		CHECK(vm.pager->ring == NULL);
		/* Nothing more is heard of it, and nothing follows the ring's memory. */
		CHECK_EQ(pager_drain(vm.pager) & PAGER_RING_BROKEN, 0);
		vm_deinit(&vm);
	}
}

static void pages_that_come_after_the_ring_broke_are_installed_all_the_same(void)
{
	struct vm vm;

	vm_init(&vm, 2, 12);
	post(&vm, 0, GPA + 4096);
	pager_drain(vm.pager);
	post(&vm, 1, 0);
	CHECK(pager_drain(vm.pager) & PAGER_RING_BROKEN);
	arrive(&vm, 1);
	CHECK_EQ(kernel.installs, 1);
	/* Its vCPU is not answered: what it shares cannot be believed. */
	CHECK_EQ(exit_lane_collect(&vm.lane[0]), EXIT_LANE_WAITING);
	vm_deinit(&vm);
}

static void parts_of_a_huge_page_are_answered_by_its_arrival(void)
{
	const uint64_t parts[] = { GPA + (3ull << HUGE_SHIFT), GPA + (3ull << HUGE_SHIFT) + 7 * 4096, GPA + (4ull << HUGE_SHIFT) };
	struct vm vm;

	vm_init(&vm, 1, HUGE_SHIFT);
	exit_lane_post(&vm.lane[0], parts, 3, 0);
	pager_drain(vm.pager);
	arrive(&vm, 3);
	CHECK_EQ(kernel.installs, 1);
	CHECK(exit_ring_is_resident(&vm.end, (3ull << HUGE_SHIFT) / 4096 + 511));
	CHECK(!exit_ring_is_resident(&vm.end, (4ull << HUGE_SHIFT) / 4096));
	CHECK_EQ(exit_lane_collect(&vm.lane[0]), EXIT_LANE_WAITING);
	CHECK_EQ(vm.lane[0].collected, 2);
	arrive(&vm, 4);
	CHECK_EQ(exit_lane_collect(&vm.lane[0]), EXIT_LANE_IDLE);
	vm_deinit(&vm);
}

static void a_page_that_is_given_back_answers_with_zeros(void)
{
	struct vm vm;

	vm_init(&vm, 1, 12);
	post(&vm, 0, GPA + 9 * 4096);
	pager_drain(vm.pager);
	kernel.next = (struct uffd_msg){ .event = UFFD_EVENT_REMOVE };
	kernel.next.arg.remove.start = BASE + 8 * 4096;
	kernel.next.arg.remove.end = BASE + 11 * 4096;
	pager_drain(vm.pager);
	CHECK_EQ(kernel.zeros, 1);
	CHECK_EQ(exit_lane_collect(&vm.lane[0]), EXIT_LANE_IDLE);
	CHECK(exit_ring_is_resident(&vm.end, 9));
	CHECK(!exit_ring_is_resident(&vm.end, 10));
	vm_deinit(&vm);
}

static void what_is_given_up_is_answered_as_poisoned(void)
{
	struct vm vm;

	vm_init(&vm, 1, 12);
	post(&vm, 0, GPA);
	pager_drain(vm.pager);
	CHECK(pager_poison_missing(vm.pager));
	CHECK_EQ(exit_lane_collect(&vm.lane[0]), EXIT_LANE_POISONED);
	vm_deinit(&vm);
}

static void more_vcpus_than_one_call_serves_are_served_by_the_next(void)
{
	static struct vm vm;
	uint64_t gpa[EXIT_RING_ENTRIES];
	unsigned calls = 1;

	vm_init(&vm, VCPUS_MAX, 12);
	for (uint32_t i = 0; i < EXIT_RING_ENTRIES; i++)
		gpa[i] = GPA + i * 4096;
	for (uint32_t vcpu = 0; vcpu < VCPUS_MAX; vcpu++)
		exit_lane_post(&vm.lane[vcpu], gpa, EXIT_RING_ENTRIES, 0);
	while (pager_drain(vm.pager) & PAGER_MORE)
		calls++;
	CHECK(calls > 1);
	CHECK_EQ(waiting(&vm), VCPUS_MAX * EXIT_RING_ENTRIES);
	for (uint32_t page = 0; page < EXIT_RING_ENTRIES; page++)
		arrive(&vm, page);
	CHECK_EQ(kernel.installs, EXIT_RING_ENTRIES);
	for (uint32_t vcpu = 0; vcpu < VCPUS_MAX; vcpu++)
		CHECK_EQ(exit_lane_collect(&vm.lane[vcpu]), EXIT_LANE_IDLE);
	vm_deinit(&vm);
}

static void another_pager_answers_what_the_first_had_taken(void)
{
	const uint64_t gpa[] = { GPA, GPA + 4096 };
	struct vm vm;

	vm_init(&vm, 2, 12);
	exit_lane_post(&vm.lane[0], gpa, 2, 0);
	post(&vm, 1, GPA + 4096);
	pager_drain(vm.pager);
	arrive(&vm, 0);
	vm_restart(&vm);
	CHECK(exit_ring_is_resident(&vm.end, 0));
	CHECK(pager_drain(vm.pager) & PAGER_SEND);
	CHECK_EQ(waiting(&vm), 2);
	arrive(&vm, 1);
	CHECK_EQ(kernel.installs, 2);
	CHECK_EQ(exit_lane_collect(&vm.lane[0]), EXIT_LANE_IDLE);
	CHECK_EQ(exit_lane_collect(&vm.lane[1]), EXIT_LANE_IDLE);
	vm_deinit(&vm);
}

static void pages_that_were_there_before_the_ring_are_resident_with_it(void)
{
	struct vm vm;

	vm_init(&vm, 1, 12);
	pager_mark_present(vm.pager, 2 * 4096, 3 * 4096);
	vm_restart(&vm);
	for (uint64_t page = 0; page < PAGES; page++)
		CHECK_EQ(exit_ring_is_resident(&vm.end, page), page - 2 < 3);
	vm_deinit(&vm);
}

static void the_end_is_told_and_nobody_is_left_asleep(void)
{
	struct vm vm;
	uint32_t word;

	vm_init(&vm, 1, 12);
	pager_mark_present(vm.pager, 0, PAGES * 4096);
	word = exit_lane_doze(&vm.lane[0]);
	CHECK_EQ(pager_release(vm.pager), 0);
	CHECK(exit_ring_is_complete(&vm.end));
	CHECK(exit_ring_is_resident(&vm.end, PAGES - 1));
	CHECK(exit_lane_doze(&vm.lane[0]) != word);
	vm_deinit(&vm);
}

static void the_pinned_set_is_asked_for_page_by_page_and_once(void)
{
	struct vm vm;

	vm_init(&vm, 1, 12);
	pager_want_gpa(vm.pager, GPA + 3 * 4096 + 100, 4096);
	CHECK_EQ(ledger_state(&vm.pager->ledger, 2), PAGE_MISSING);
	CHECK_EQ(ledger_state(&vm.pager->ledger, 3), PAGE_REQUESTED);
	CHECK_EQ(ledger_state(&vm.pager->ledger, 4), PAGE_REQUESTED);
	CHECK_EQ(ledger_state(&vm.pager->ledger, 5), PAGE_MISSING);
	pager_want_gpa(vm.pager, GPA + 3 * 4096, 4096);
	CHECK_EQ(vm.pager->wanted_tail - vm.pager->wanted_head, 2);
	/* Where there is no memory there is nothing to ask for. */
	pager_want_gpa(vm.pager, 0, 4096);
	pager_want_gpa(vm.pager, GPA + (PAGES - 1) * 4096ull, 4 * 4096);
	CHECK_EQ(vm.pager->wanted_tail - vm.pager->wanted_head, 3);
	vm_deinit(&vm);
}

/* The kernel lets a thread that gives memory back go on as soon as its event is read. */
static void nothing_is_read_while_a_vcpu_installs(void)
{
	struct vm vm;
	unsigned signals;

	vm_init(&vm, 2, 12);
	vm.pager->ring->features |= EXIT_RING_LOCAL;
	exit_ring_allow_local(vm.pager->ring);
	pager_drain(vm.pager);
	CHECK(exit_lane_enter(&vm.lane[1]));
	kernel.next = (struct uffd_msg){ .event = UFFD_EVENT_REMOVE };
	kernel.next.arg.remove.start = BASE;
	kernel.next.arg.remove.end = BASE + 4096;
	signals = pager_drain(vm.pager);
	CHECK_EQ(signals & (PAGER_HELD | PAGER_STALLED), (unsigned)(PAGER_HELD | PAGER_STALLED));
	CHECK_EQ(kernel.next.event, UFFD_EVENT_REMOVE);
	CHECK(!exit_lane_enter(&vm.lane[0]));
	CHECK(exit_lane_leave(&vm.lane[0]));
	CHECK(exit_lane_leave(&vm.lane[1])); /* to be rung for */
	CHECK(!(pager_drain(vm.pager) & PAGER_HELD));
	CHECK_EQ(kernel.next.event, 0);
	/* What is absent now need not be the image's. */
	CHECK(!exit_lane_enter(&vm.lane[1]));
	vm_deinit(&vm);
}

int main(void)
{
	nothing_is_read_while_a_vcpu_installs();
	a_fault_is_asked_for_and_answered();
	a_fault_outside_of_memory_breaks_the_ring();
	pages_that_come_after_the_ring_broke_are_installed_all_the_same();
	parts_of_a_huge_page_are_answered_by_its_arrival();
	a_page_that_is_given_back_answers_with_zeros();
	what_is_given_up_is_answered_as_poisoned();
	more_vcpus_than_one_call_serves_are_served_by_the_next();
	another_pager_answers_what_the_first_had_taken();
	pages_that_were_there_before_the_ring_are_resident_with_it();
	the_end_is_told_and_nobody_is_left_asleep();
	the_pinned_set_is_asked_for_page_by_page_and_once();
	return 0;
}
