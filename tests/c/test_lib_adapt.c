// sources: ../libpostcopy/adapt.c ../libpostcopy/resolve.c ../libpostcopy/walk.c ../libpostcopy/operands.c ../libpostcopy/stack.c ../libpostcopy/registers.c ../libpostcopy/guard.c ../libpostcopy/mmio.c ../libpostcopy/memory.c exit_ring_vmm.c
// libs: -lcapstone -Wl,--wrap=ioctl
#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "../../daemon/libpostcopy/handle.h"
#include "../../daemon/libpostcopy/resolve.h"
#include "check.h"

/*
 * A guest without paging: registers and memory are what the test says, KVM is not asked.
 * RAM: 64 pages at 1 MiB, then one huge page at 16 MiB; the rest is devices.
 */
#define RAM_GPA 0x100000u
#define RAM_PAGES 64u
#define HUGE_GPA 0x1000000u
#define HUGE_BYTES 0x200000u
#define IMAGE_PAGES (RAM_PAGES + HUGE_BYTES / 4096)
#define CODE_PAGE 8u

static struct {
	struct cpu_state cpu;
	struct kvm_run run;
	struct postcopy pc;
	struct vcpu_side vcpu;
	struct postcopy_region region[2];
	uint8_t *memory;
	uint64_t *resident;
	void *ring;
	struct postcopy_answer answer;
	bool no_registers;
} vm;

int __wrap_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	void *out;

	(void)fd;
	va_start(arguments, request);
	out = va_arg(arguments, void *);
	va_end(arguments);
	if (vm.no_registers)
		return -1;
	if (request == KVM_GET_REGS)
		memcpy(out, &vm.cpu.regs, sizeof(vm.cpu.regs));
	else if (request == KVM_GET_SREGS)
		memcpy(out, &vm.cpu.sregs, sizeof(vm.cpu.sregs));
	else
		return -1;
	return 0;
}

static void begin(void)
{
	size_t len = exit_ring_bytes(1, IMAGE_PAGES);

	memset(&vm, 0, sizeof(vm));
	vm.memory = aligned_alloc(HUGE_BYTES, 2 * HUGE_BYTES);
	vm.ring = aligned_alloc(4096, len);
	memset(vm.memory, 0, 2 * HUGE_BYTES);
	memset(vm.ring, 0, len);
	exit_ring_format(&vm.pc.ring, vm.ring, 1, IMAGE_PAGES, false);
	vm.pc.ring.header->accepted = EXIT_RING_RESIDENCY;
	vm.resident = (uint64_t *)((char *)vm.ring + vm.pc.ring.header->residency_offset);
	exit_lane_init(&vm.vcpu.lane, &vm.pc.ring, 0);
	vm.region[0] = (struct postcopy_region){ RAM_GPA, (uintptr_t)vm.memory, RAM_PAGES << 12, 0, 4096 };
	vm.region[1] = (struct postcopy_region){ HUGE_GPA, (uintptr_t)vm.memory + HUGE_BYTES, HUGE_BYTES,
						 RAM_PAGES << 12, HUGE_BYTES };
	vm.pc.region = vm.region;
	vm.pc.regions = 2;
	vm.pc.vcpu = &vm.vcpu;
	vm.cpu.sregs.cs.db = vm.cpu.sregs.ss.db = 1;
	vm.cpu.regs.rip = RAM_GPA + (CODE_PAGE << 12);
	vm.cpu.regs.rsp = RAM_GPA + 0x4000;
}

static void end(void)
{
	resolve_deinit(&vm.vcpu);
	free(vm.memory);
	free(vm.ring);
}

static void has(uint64_t page)
{
	vm.resident[page / 64] |= 1ull << page % 64;
}

static enum postcopy_action adapt(int ret, int error)
{
	const struct postcopy_exit exit = { ret, error, -1, &vm.run };

	return postcopy_adapt(&vm.pc, 0, &exit, &vm.answer);
}

static enum postcopy_action annotated(uint64_t flags, uint64_t gpa, uint64_t size, int error)
{
	const uint64_t fault[] = { flags, gpa, size };

	vm.run.exit_reason = 39;
	memcpy(vm.run.padding, fault, sizeof(fault));
	return adapt(-1, error);
}

static void code(const char *bytes, size_t len)
{
	memcpy(vm.memory + (vm.cpu.regs.rip - RAM_GPA), bytes, len);
}

static void an_annotated_exit_names_its_pages(void)
{
	begin();
	CHECK_EQ(annotated(2, RAM_GPA + 5000, 1, EFAULT), POSTCOPY_WAIT);
	CHECK_EQ(vm.answer.shape, POSTCOPY_SHAPE_ANNOTATED);
	CHECK_EQ(vm.answer.count, 1);
	CHECK_EQ(vm.answer.gpa[0], RAM_GPA + 4096);
	CHECK_EQ(vm.vcpu.want_flags, EXIT_FAULT_WRITE);
	CHECK_EQ(annotated(0, RAM_GPA + 4096, 4096, EHWPOISON), POSTCOPY_WAIT);
	has(3);
	CHECK_EQ(annotated(0, RAM_GPA + 0x2000, 0x3000, EFAULT), POSTCOPY_WAIT);
	CHECK_EQ(vm.answer.count, 2);
	CHECK_EQ(vm.answer.gpa[0], RAM_GPA + 0x2000);
	CHECK_EQ(vm.answer.gpa[1], RAM_GPA + 0x4000);
	CHECK_EQ(annotated(0, RAM_GPA, RAM_PAGES << 12, EFAULT), POSTCOPY_WAIT);
	CHECK_EQ(vm.answer.count, POSTCOPY_PAGES_MAX);
	CHECK_EQ(annotated(0, HUGE_GPA + 0x12345, 0x100000, EFAULT), POSTCOPY_WAIT);
	CHECK_EQ(vm.answer.count, 1);
	CHECK_EQ(vm.answer.gpa[0], HUGE_GPA);
	/* A size that leads out of the region, or nowhere. */
	CHECK_EQ(annotated(0, RAM_GPA + ((RAM_PAGES - 1) << 12), UINT64_MAX / 2, EFAULT), POSTCOPY_WAIT);
	CHECK_EQ(vm.answer.count, 1);
	end();
}

static void an_annotated_exit_that_is_not_ours_is_left_alone(void)
{
	begin();
	CHECK_EQ(annotated(0, 0, 4096, EFAULT), POSTCOPY_NOT_A_FAULT);
	CHECK_EQ(annotated(0, RAM_GPA + (RAM_PAGES << 12), 4096, EFAULT), POSTCOPY_NOT_A_FAULT);
	CHECK_EQ(annotated(8, RAM_GPA, 4096, EFAULT), POSTCOPY_NOT_A_FAULT); /* conversion to private memory */
	has(0);
	CHECK_EQ(annotated(0, RAM_GPA, 4096, EHWPOISON), POSTCOPY_ERROR);
	CHECK_EQ(vm.answer.reason, POSTCOPY_REASON_POISONED);
	end();
}

static void a_stale_exit_reason_is_not_believed(void)
{
	begin();
	CHECK_EQ(annotated(0, RAM_GPA, 4096, EINTR), POSTCOPY_NOT_A_FAULT);
	CHECK_EQ(annotated(0, RAM_GPA, 4096, EAGAIN), POSTCOPY_NOT_A_FAULT);
	vm.run.exit_reason = KVM_EXIT_MMIO;
	vm.run.mmio.phys_addr = RAM_GPA;
	vm.run.mmio.len = 4;
	CHECK_EQ(adapt(-1, EINTR), POSTCOPY_NOT_A_FAULT);
	/* With EFAULT an old reason is no reason either: the instruction is looked at. */
	CHECK_EQ(adapt(-1, EFAULT), POSTCOPY_WAIT);
	CHECK_EQ(vm.answer.shape, POSTCOPY_SHAPE_BARE);
	CHECK_EQ(adapt(-1, EHWPOISON), POSTCOPY_NOT_A_FAULT);
	vm.run.exit_reason = KVM_EXIT_HLT;
	CHECK_EQ(adapt(0, 0), POSTCOPY_NOT_A_FAULT);
	end();
}

static void a_bare_fault_asks_for_code_before_operands(void)
{
	begin();
	vm.cpu.regs.rip += 4094;
	vm.cpu.regs.rdi = RAM_GPA + 0x1fff;
	code("\x81\x07\x11\x22\x33\x44", 6); /* add dword [edi], imm32: crosses into the next page */
	CHECK_EQ(adapt(-1, EFAULT), POSTCOPY_WAIT);
	CHECK_EQ(vm.answer.count, 1);
	CHECK_EQ(vm.answer.gpa[0], RAM_GPA + (CODE_PAGE << 12));
	has(CODE_PAGE);
	CHECK_EQ(adapt(-1, EFAULT), POSTCOPY_WAIT);
	CHECK_EQ(vm.answer.count, 1);
	CHECK_EQ(vm.answer.gpa[0], RAM_GPA + ((CODE_PAGE + 1) << 12));
	has(CODE_PAGE + 1);
	CHECK_EQ(adapt(-1, EFAULT), POSTCOPY_WAIT);
	CHECK_EQ(vm.answer.count, 2);
	CHECK_EQ(vm.answer.gpa[0], RAM_GPA + 0x1000);
	CHECK_EQ(vm.answer.gpa[1], RAM_GPA + 0x2000);
	end();
}

/* An instruction that ends with its page does not need the next one. */
static void code_at_the_end_of_a_page_is_enough(void)
{
	begin();
	has(CODE_PAGE);
	vm.cpu.regs.rip += 4094;
	vm.cpu.regs.rdi = RAM_GPA;
	code("\x8b\x07", 2);
	CHECK_EQ(adapt(-1, EFAULT), POSTCOPY_WAIT);
	CHECK_EQ(vm.answer.count, 1);
	CHECK_EQ(vm.answer.gpa[0], RAM_GPA);
	end();
}

static void nothing_missing_is_tried_again_and_then_an_error(void)
{
	int tries = 0;

	begin();
	has(CODE_PAGE);
	has(0);
	vm.cpu.regs.rdi = RAM_GPA;
	code("\x8b\x07", 2);
	while (adapt(-1, EFAULT) == POSTCOPY_RUN_AGAIN)
		CHECK(++tries <= (int)GUARD_UNEXPLAINED_MAX);
	CHECK(tries > 0);
	CHECK_EQ(vm.answer.action, POSTCOPY_ERROR);
	CHECK_EQ(vm.answer.reason, POSTCOPY_REASON_UNEXPLAINED);
	end();
}

static void the_same_fault_for_ever_is_an_error_and_progress_is_not(void)
{
	begin();
	has(CODE_PAGE);
	vm.cpu.regs.rdi = RAM_GPA;
	code("\xf3\xa4", 2); /* rep movsb */
	for (uint32_t i = 0; i < 3 * GUARD_REPEATS_MAX; i++) {
		vm.cpu.regs.rcx = 1000 - i;
		CHECK_EQ(adapt(-1, EFAULT), POSTCOPY_WAIT);
	}
	for (uint32_t i = 0; i < GUARD_REPEATS_MAX - 1; i++)
		CHECK_EQ(adapt(-1, EFAULT), POSTCOPY_WAIT);
	CHECK_EQ(adapt(-1, EFAULT), POSTCOPY_ERROR);
	CHECK_EQ(vm.answer.reason, POSTCOPY_REASON_NO_PROGRESS);
	CHECK_EQ(vm.answer.count, 0);
	end();
}

static void what_cannot_be_told_is_an_error_that_says_so(void)
{
	begin();
	has(CODE_PAGE);
	code("\xc4\xe2\x6d\x92\x04\x8f", 6); /* vgatherdps */
	CHECK_EQ(adapt(-1, EFAULT), POSTCOPY_ERROR);
	CHECK_EQ(vm.answer.reason, POSTCOPY_REASON_GATHER);
	code("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 15);
	CHECK_EQ(adapt(-1, EFAULT), POSTCOPY_ERROR);
	CHECK_EQ(vm.answer.reason, POSTCOPY_REASON_UNDECODED);
	vm.cpu.regs.rip = 0x5000; /* no memory that the library can read */
	CHECK_EQ(adapt(-1, EFAULT), POSTCOPY_ERROR);
	CHECK_EQ(vm.answer.reason, POSTCOPY_REASON_UNREADABLE);
	vm.no_registers = true;
	CHECK_EQ(adapt(-1, EFAULT), POSTCOPY_ERROR);
	CHECK_EQ(vm.answer.reason, POSTCOPY_REASON_UNREADABLE);
	end();
}

static void emulation_failure_is_ours_only_without_its_code(void)
{
	begin();
	vm.run.exit_reason = KVM_EXIT_INTERNAL_ERROR;
	vm.run.internal.suberror = KVM_INTERNAL_ERROR_EMULATION;
	CHECK_EQ(adapt(0, 0), POSTCOPY_WAIT);
	CHECK_EQ(vm.answer.shape, POSTCOPY_SHAPE_EMULATION);
	CHECK_EQ(vm.answer.gpa[0], RAM_GPA + (CODE_PAGE << 12));
	has(CODE_PAGE);
	code("\x8b\x07", 2);
	CHECK_EQ(adapt(0, 0), POSTCOPY_NOT_A_FAULT);
	vm.run.internal.suberror = 2;
	vm.resident[0] = 0;
	CHECK_EQ(adapt(0, 0), POSTCOPY_NOT_A_FAULT);
	end();
}

static enum postcopy_action mmio(uint64_t gpa, uint32_t len, bool is_write)
{
	vm.run.exit_reason = KVM_EXIT_MMIO;
	vm.run.mmio.phys_addr = gpa;
	vm.run.mmio.len = len;
	vm.run.mmio.is_write = is_write;
	return adapt(0, 0);
}

static void mmio_on_ram_is_done_in_memory_with_its_width(void)
{
	begin();
	for (uint32_t len = 1; len <= 8; len++) {
		for (uint32_t at = 0x100; at < 0x108; at++) {
			uint8_t *place = vm.memory + at;

			memset(place - 16, 0xee, 64);
			memcpy(vm.run.mmio.data, "\1\2\3\4\5\6\7\10", 8);
			CHECK_EQ(mmio(RAM_GPA + at, len, true), POSTCOPY_COMPLETE_MMIO);
			CHECK_EQ(vm.answer.count, 1);
			CHECK(postcopy_complete_mmio(&vm.pc, &vm.run));
			CHECK(!memcmp(place, "\1\2\3\4\5\6\7\10", len));
			CHECK_EQ(place[len], 0xee);
			CHECK_EQ(place[-1], 0xee);
			memset(vm.run.mmio.data, 0xaa, 8);
			CHECK_EQ(mmio(RAM_GPA + at, len, false), POSTCOPY_COMPLETE_MMIO);
			CHECK(postcopy_complete_mmio(&vm.pc, &vm.run));
			CHECK(!memcmp(vm.run.mmio.data, "\1\2\3\4\5\6\7\10", len));
			CHECK(len == 8 || vm.run.mmio.data[len] == 0xaa);
		}
	}
	has(0);
	CHECK_EQ(mmio(RAM_GPA + 8, 4, false), POSTCOPY_COMPLETE_MMIO);
	CHECK_EQ(vm.answer.count, 0);
	end();
}

static void mmio_that_is_a_devices_is_left_to_it(void)
{
	begin();
	CHECK_EQ(mmio(RAM_GPA - 1, 1, false), POSTCOPY_NOT_A_FAULT);
	CHECK_EQ(mmio(RAM_GPA + (RAM_PAGES << 12), 4, true), POSTCOPY_NOT_A_FAULT);
	CHECK(!postcopy_complete_mmio(&vm.pc, &vm.run));
	CHECK_EQ(mmio(RAM_GPA, 9, false), POSTCOPY_ERROR);
	CHECK_EQ(vm.answer.reason, POSTCOPY_REASON_BAD_ACCESS);
	CHECK_EQ(mmio(RAM_GPA, 0, false), POSTCOPY_ERROR);
	CHECK_EQ(mmio(RAM_GPA + 4094, 4, false), POSTCOPY_ERROR);
	CHECK(!postcopy_complete_mmio(&vm.pc, &vm.run));
	end();
}

int main(void)
{
	an_annotated_exit_names_its_pages();
	an_annotated_exit_that_is_not_ours_is_left_alone();
	a_stale_exit_reason_is_not_believed();
	a_bare_fault_asks_for_code_before_operands();
	code_at_the_end_of_a_page_is_enough();
	nothing_missing_is_tried_again_and_then_an_error();
	the_same_fault_for_ever_is_an_error_and_progress_is_not();
	what_cannot_be_told_is_an_error_that_says_so();
	emulation_failure_is_ours_only_without_its_code();
	mmio_on_ram_is_done_in_memory_with_its_width();
	mmio_that_is_a_devices_is_left_to_it();
	return 0;
}
