/*
 * Runs one instruction twice: in a guest whose memory is all there, and in one whose memory comes through libpostcopy.
 *
 * usage: resolver_guest CPL CODE_HEX [REG=VALUE]... [@ADDRESS=VALUE]... [tables] [kick]
 *
 * CODE is placed at `rip` (default 0x200000) and runs on to a port access, which ends the guest; at 0x10000, always there, is
 * another such end to jump to. @ADDRESS=VALUE puts a 64-bit value into memory. `tables`: the page tables themselves lie in
 * memory that comes late, as the pinned set. `kick`: nobody answers; the vCPU is kicked out of its wait.
 *
 * Prints a JSON object: which pages the guest's own accessed bits say were touched in the first run, which pages were asked for in
 * the second, in which shapes, and whether registers and memory ended up the same.
 *
 * GPA 0 .. 2 MiB is a slot that is always there, mapped as one large page; 2 MiB .. 2 MiB + 256 KiB is the memory under test,
 * mapped by 4 KiB pages. Linear addresses are physical.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../../daemon/libpostcopy/libpostcopy.h"
#include "../c/check.h"
#include "../doubles/exit_daemon.h"

#define BOOT_BYTES 0x200000u
#define DATA_GPA 0x200000u
#define DATA_PAGES 64u
#define DATA_BYTES (DATA_PAGES << 12)

#define PML4 0x1000u
#define PDPT 0x2000u
#define PD 0x3000u
#define PT 0x4000u
#define GDT 0x8000u
#define STOP 0x10000u
/* Where the tables lie instead with `tables`. */
#define LATE_TABLES (DATA_GPA + (60u << 12))

#define PRESENT_USER 7u
#define PRESENT_USER_ACCESSED_DIRTY 0x67u
#define LARGE 0x80u
#define ACCESSED 0x20u
#define STOP_PORT 0x11
#define EXITS_MAX 1000u
#define UFFD_USER_MODE_ONLY_FLAG 1

struct machine {
	int kvm, vm, vcpu;
	uint8_t *boot, *data;
	struct kvm_run *run;
	struct kvm_regs regs;
	struct kvm_fpu fpu;
};

static struct {
	int cpl;
	uint8_t code[64];
	size_t code_len;
	struct kvm_regs regs;
	bool tables, kick;
	uint8_t image[DATA_BYTES] __attribute__((aligned(4096)));
	uint64_t asked; /* bit a page of data, by exit */
	uint64_t seen;	/* by userfaultfd event */
	unsigned shapes[POSTCOPY_SHAPES];
	int held_fd;
} test;

static uint64_t tables_at(void)
{
	return test.tables ? LATE_TABLES : PML4;
}

static void put64(struct machine *machine, uint64_t gpa, uint64_t value)
{
	uint8_t *place = gpa < DATA_GPA ? machine->boot + gpa : test.image + (gpa - DATA_GPA);

	memcpy(place, &value, sizeof(value));
}

/* Entries in use have their accessed bits set, but for the leaves of the memory under test, which are the witnesses. */
static void build_tables(struct machine *machine)
{
	uint64_t at = tables_at(), step = test.tables ? 4096 : PDPT - PML4;

	put64(machine, at, (at + step) | PRESENT_USER_ACCESSED_DIRTY);
	put64(machine, at + step, (at + 2 * step) | PRESENT_USER_ACCESSED_DIRTY);
	put64(machine, at + 2 * step, 0 | PRESENT_USER_ACCESSED_DIRTY | LARGE);
	put64(machine, at + 2 * step + 8, (at + 3 * step) | PRESENT_USER_ACCESSED_DIRTY);
	for (uint64_t page = 0; page < DATA_PAGES; page++)
		put64(machine, at + 3 * step + page * 8, (DATA_GPA + (page << 12)) | PRESENT_USER);
}

static uint8_t *map_anonymous(size_t len)
{
	void *mem = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(mem != MAP_FAILED);
	return mem;
}

static void add_slot(const struct machine *machine, uint32_t slot, uint64_t gpa, uint64_t len, void *at)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .guest_phys_addr = gpa, .memory_size = len, .userspace_addr = (uintptr_t)at
	};

	CHECK_EQ(ioctl(machine->vm, KVM_SET_USER_MEMORY_REGION, &region), 0);
}

static void set_cpuid(const struct machine *machine)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entry[256];
	} cpuid = { .head.nent = 256 };

	CHECK_EQ(ioctl(machine->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), 0);
	CHECK_EQ(ioctl(machine->vcpu, KVM_SET_CPUID2, &cpuid), 0);
}

/* Let AVX-512 be used, or AVX, or neither: as far as the host goes. */
static void enable_vectors(const struct machine *machine)
{
	static const uint64_t wishes[] = { 0xe7, 7, 3 };

	for (size_t i = 0; i < sizeof(wishes) / sizeof(wishes[0]); i++) {
		struct kvm_xcrs xcrs = { .nr_xcrs = 1, .xcrs = { { .xcr = 0, .value = wishes[i] } } };

		if (ioctl(machine->vcpu, KVM_SET_XCRS, &xcrs) == 0)
			return;
	}
}

static void set_segments(struct kvm_sregs *sregs)
{
	uint8_t user = test.cpl ? 3 : 0;
	struct kvm_segment code = { .limit = 0xffffffff, .selector = test.cpl ? 0x33 : 0x10, .type = 11, .present = 1,
				    .dpl = user, .s = 1, .l = 1, .g = 1 };
	struct kvm_segment data = code;

	data.type = 3;
	data.selector = test.cpl ? 0x2b : 0x18;
	data.l = 0;
	data.db = 1;
	sregs->cs = code;
	sregs->ds = sregs->es = sregs->fs = sregs->gs = sregs->ss = data;
	sregs->gdt.base = GDT;
	sregs->gdt.limit = 0x3f;
}

static void set_cpu(struct machine *machine)
{
	struct kvm_sregs sregs;

	put64(machine, GDT + 0x28, 0x00cff3000000ffffull); /* data, DPL 3, accessed */
	put64(machine, GDT + 0x30, 0x00affb000000ffffull); /* 64-bit code, DPL 3, accessed */
	CHECK_EQ(ioctl(machine->vcpu, KVM_GET_SREGS, &sregs), 0);
	set_segments(&sregs);
	sregs.cr3 = tables_at();
	sregs.cr0 = 0x80050033; /* PG WP NE ET MP PE AM */
	sregs.cr4 = 0x40620;	/* OSXSAVE OSXMMEXCPT OSFXSR PAE */
	sregs.efer = 0xd01;	/* NXE LMA LME SCE */
	CHECK_EQ(ioctl(machine->vcpu, KVM_SET_SREGS, &sregs), 0);
	enable_vectors(machine);
	CHECK_EQ(ioctl(machine->vcpu, KVM_SET_REGS, &test.regs), 0);
}

static void machine_begin(struct machine *machine)
{
	int run_bytes;

	machine->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	machine->vm = ioctl(machine->kvm, KVM_CREATE_VM, 0);
	machine->vcpu = ioctl(machine->vm, KVM_CREATE_VCPU, 0);
	CHECK(machine->vcpu >= 0);
	run_bytes = ioctl(machine->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	machine->run = mmap(NULL, (size_t)run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, machine->vcpu, 0);
	CHECK(machine->run != MAP_FAILED);
	machine->boot = map_anonymous(BOOT_BYTES);
	machine->data = map_anonymous(DATA_BYTES);
	add_slot(machine, 0, 0, BOOT_BYTES, machine->boot);
	add_slot(machine, 1, DATA_GPA, DATA_BYTES, machine->data);
	memcpy(machine->boot + STOP, "\xe6\x11", 2); /* out 0x11, al */
	build_tables(machine);
	set_cpuid(machine);
	set_cpu(machine);
}

static bool is_stop(const struct kvm_run *run)
{
	return run->exit_reason == KVM_EXIT_IO && run->io.port == STOP_PORT;
}

static void machine_end(struct machine *machine)
{
	CHECK_EQ(ioctl(machine->vcpu, KVM_GET_REGS, &machine->regs), 0);
	CHECK_EQ(ioctl(machine->vcpu, KVM_GET_FPU, &machine->fpu), 0);
}

/* --- the first run ----------------------------------------------------------------------------------------------- */

/* Returns the touched pages, bit a page. */
static uint64_t run_with_memory(struct machine *machine)
{
	uint64_t touched = 0, leaves = test.tables ? 0 : PT;

	machine_begin(machine);
	memcpy(machine->data, test.image, DATA_BYTES);
	CHECK_EQ(ioctl(machine->vcpu, KVM_RUN, 0), 0);
	if (!is_stop(machine->run)) {
		fprintf(stderr, "with all memory: exit %u, internal %u\n", machine->run->exit_reason,
			machine->run->internal.suberror);
		exit(2);
	}
	machine_end(machine);
	for (uint64_t page = 0; page < DATA_PAGES; page++) {
		const uint8_t *table = leaves ? machine->boot + leaves : machine->data + (LATE_TABLES - DATA_GPA) + 3 * 4096;

		touched |= (uint64_t)(table[page * 8] & ACCESSED ? 1 : 0) << page;
	}
	return touched;
}

/* --- the second run ---------------------------------------------------------------------------------------------- */

static void install(struct exit_daemon *daemon, uint64_t page, uint64_t hva)
{
	struct uffdio_copy copy = {
		.dst = hva & ~4095ull, .src = (uintptr_t)test.image + (page << 12), .len = 4096
	};

	if (ioctl(daemon->uffd, UFFDIO_COPY, &copy))
		CHECK_EQ(errno, EEXIST);
	exit_ring_mark(&daemon->ring, page, 1, true);
}

static uint8_t *data_hva;

static int on_fault(struct exit_daemon *daemon, const struct exit_fault *fault)
{
	uint64_t page = (fault->gpa - DATA_GPA) >> 12, one = 1;

	CHECK(page < DATA_PAGES);
	test.asked |= 1ull << page;
	if (test.kick) {
		CHECK_EQ(write(test.held_fd, &one, sizeof(one)), sizeof(one));
		return EXIT_DAEMON_HOLD;
	}
	install(daemon, page, (uintptr_t)data_hva + (page << 12));
	return EXIT_RESOLVED;
}

static void on_touch(struct exit_daemon *daemon, uint64_t address)
{
	uint64_t page = (address - (uintptr_t)data_hva) >> 12;

	test.seen |= 1ull << page;
	install(daemon, page, address);
}

static int register_memory(const struct machine *machine)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .range = { (uintptr_t)machine->data, DATA_BYTES }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY_FLAG);

	CHECK(uffd >= 0);
	CHECK_EQ(ioctl(uffd, UFFDIO_API, &api), 0);
	CHECK_EQ(ioctl(uffd, UFFDIO_REGISTER, &range), 0);
	return uffd;
}

static const void *boot_memory(void *context, uint64_t gpa, size_t len)
{
	const struct machine *machine = context;

	return gpa < BOOT_BYTES && len <= BOOT_BYTES - gpa ? machine->boot + gpa : NULL;
}

static struct postcopy *connect_library(struct machine *machine, const char *path)
{
	const struct postcopy_range pinned = { LATE_TABLES, 4 * 4096 };
	const struct postcopy_region region = {
		.gpa = DATA_GPA, .hva = (uintptr_t)machine->data, .size = DATA_BYTES, .page_size = 4096
	};
	const struct postcopy_config config = {
		.config_size = sizeof(config), .uffd = register_memory(machine), .vcpus = 1, .regions = &region, .region_count = 1,
		.pinned = &pinned, .pinned_count = test.tables, .other_memory = boot_memory, .context = machine,
	};
	struct postcopy *pc;

	CHECK_EQ(postcopy_connect(path, &config, &pc), 0);
	return pc;
}

/* Run to the end. Returns NULL, or why it did not come. */
static const char *run_through_library(struct machine *machine, struct postcopy *pc)
{
	for (unsigned exits = 0; exits < EXITS_MAX; exits++) {
		int ret = ioctl(machine->vcpu, KVM_RUN, 0);
		const struct postcopy_exit outcome = { ret, errno, machine->vcpu, machine->run };
		struct postcopy_answer answer;

		switch (postcopy_adapt(pc, 0, &outcome, &answer)) {
		case POSTCOPY_NOT_A_FAULT:
			if (ret < 0 && errno == EINTR)
				continue;
			return ret == 0 && is_stop(machine->run) ? NULL : "an exit that is no fault";
		case POSTCOPY_ERROR:
			return postcopy_reason_text(answer.reason);
		case POSTCOPY_RUN_AGAIN:
			continue;
		case POSTCOPY_WAIT:
		case POSTCOPY_COMPLETE_MMIO:
			break;
		}
		test.shapes[answer.shape]++;
		if (postcopy_wait(pc, 0) != POSTCOPY_RESUMED)
			return "interrupted";
		if (answer.action == POSTCOPY_COMPLETE_MMIO)
			CHECK(postcopy_complete_mmio(pc, machine->run));
	}
	return "no end";
}

static void *kick(void *argument)
{
	uint64_t count;

	/* When the daemon has the fault, the vCPU waits or is about to. */
	CHECK_EQ(read(test.held_fd, &count, sizeof(count)), sizeof(count));
	postcopy_kick(argument, 0);
	return NULL;
}

static const char *run_late(struct machine *machine)
{
	struct exit_daemon daemon = { .resolve = on_fault, .touched = on_touch };
	char path[64];
	pthread_t kicker;
	struct postcopy *pc;
	const char *problem;

	snprintf(path, sizeof(path), "/tmp/postcopy-resolver-%d", getpid());
	daemon.path = path;
	test.held_fd = eventfd(0, EFD_CLOEXEC);
	machine_begin(machine);
	data_hva = machine->data;
	exit_daemon_start(&daemon);
	pc = connect_library(machine, path);
	exit_daemon_wait_attached(&daemon);
	CHECK_EQ(postcopy_populate(pc, 0), POSTCOPY_RESUMED);
	if (test.kick)
		CHECK_EQ(pthread_create(&kicker, NULL, kick, pc), 0);
	problem = run_through_library(machine, pc);
	machine_end(machine);
	if (test.kick) {
		CHECK_EQ(pthread_join(kicker, NULL), 0);
	} else {
		/* Reading what the guest did not touch brings the rest of memory, as events. */
		for (uint64_t page = 0; page < DATA_PAGES; page++)
			(void)*(volatile uint8_t *)(machine->data + (page << 12));
	}
	exit_daemon_crash(&daemon);
	unlink(path);
	return problem;
}

/* --- command line and report ------------------------------------------------------------------------------------- */

static uint64_t *register_named(const char *name, size_t len)
{
	static const char *const names[] = { "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8",
					     "r9",  "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags" };

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		if (strlen(names[i]) == len && !strncmp(names[i], name, len))
			return (uint64_t *)&test.regs + i;
	}
	return NULL;
}

static void parse_assignment(const char *text)
{
	const char *equals = strchr(text, '=');
	uint64_t value, *place;

	CHECK(equals != NULL);
	value = strtoull(equals + 1, NULL, 0);
	if (text[0] == '@') {
		uint64_t address = strtoull(text + 1, NULL, 0);

		CHECK(address >= DATA_GPA && address + 8 <= DATA_GPA + DATA_BYTES);
		memcpy(test.image + (address - DATA_GPA), &value, sizeof(value));
		return;
	}
	place = register_named(text, (size_t)(equals - text));
	CHECK(place != NULL);
	*place = value;
}

static void parse(int argc, char **argv)
{
	uint64_t seed = 99;
	unsigned byte;

	CHECK(argc >= 3);
	test.cpl = atoi(argv[1]);
	for (const char *at = argv[2]; sscanf(at, "%2x", &byte) == 1; at += 2)
		test.code[test.code_len++] = (uint8_t)byte;
	memcpy(test.code + test.code_len, "\xe6\x11", 2);
	test.code_len += 2;
	for (size_t i = 0; i < DATA_BYTES; i += 8) {
		uint64_t word = next_random(&seed);

		memcpy(test.image + i, &word, 8);
	}
	test.regs = (struct kvm_regs){ .rip = DATA_GPA, .rflags = test.cpl ? 0x3002 : 2 };
	for (int i = 3; i < argc; i++) {
		if (!strcmp(argv[i], "tables"))
			test.tables = true;
		else if (!strcmp(argv[i], "kick"))
			test.kick = true;
		else
			parse_assignment(argv[i]);
	}
	memcpy(test.image + (test.regs.rip - DATA_GPA), test.code, test.code_len);
}

static void print_pages(const char *name, uint64_t pages)
{
	const char *separator = "";

	printf("\"%s\": [", name);
	for (unsigned page = 0; page < DATA_PAGES; page++) {
		if (pages >> page & 1) {
			printf("%s%u", separator, page);
			separator = ", ";
		}
	}
	printf("], ");
}

int main(int argc, char **argv)
{
	static struct machine first, second;
	uint64_t touched;
	const char *problem;
	bool same_memory;

	/* A guest that hangs is a failure, not a hang of the tests. */
	alarm(20);
	parse(argc, argv);
	touched = run_with_memory(&first);
	problem = run_late(&second);
	/* The accessed bits of late tables are the tables' content; compare what lies before them. */
	same_memory = test.kick || !memcmp(first.data, second.data, test.tables ? LATE_TABLES - DATA_GPA : DATA_BYTES);
	printf("{");
	print_pages("touched", touched);
	print_pages("asked", test.asked);
	print_pages("events", test.seen);
	printf("\"annotated\": %u, \"bare\": %u, \"mmio\": %u, \"emulation\": %u, ", test.shapes[POSTCOPY_SHAPE_ANNOTATED],
	       test.shapes[POSTCOPY_SHAPE_BARE], test.shapes[POSTCOPY_SHAPE_MMIO], test.shapes[POSTCOPY_SHAPE_EMULATION]);
	printf("\"problem\": \"%s\", \"same_registers\": %s, \"same_memory\": %s}\n", problem ? problem : "",
	       !memcmp(&first.regs, &second.regs, sizeof(first.regs)) && !memcmp(&first.fpu, &second.fpu, sizeof(first.fpu)) ?
		       "true" :
		       "false",
	       same_memory ? "true" : "false");
	return 0;
}
