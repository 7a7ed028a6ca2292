/*
 * x86-64 guests at CPL 3 that run natively; slot 0 holds page tables and code, slot 2 the logs, both always present.
 *
 *   0x1000 PML4    0x2000 PDPT    0x3000 page directory of GiB 0    0x4000 code    0x5000 page directory of GiB 1 (logs)
 *   0x10000 page directories of memory, one a GiB
 */
#define _GNU_SOURCE
#include "exits_vm.h"

#include "libpostcopy.h"

#define BOOT_BYTES (2ul << 20)
#define LOG_GPA (1ul << 30)
#define LOG_BYTES (64ul << 20)
#define PML4 0x1000u
#define PDPT 0x2000u
#define PD_BOOT 0x3000u
#define CODE 0x4000u
#define PD_LOGS 0x5000u
#define PDS_MEMORY 0x10000u
/* Present, writable, user, accessed, dirty. */
#define ENTRY 0x67u
#define ENTRY_LARGE 0xe7u
#define TSS_GPA 0xfffbd000u
#define DONE_PORT 0x11
#define COST_TRIES 200

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

/* rdi: next address, rsi: end, r8: the word expected there, r9: where the next time goes, rbx: wrong words. */
extern const uint8_t guest_begin[], guest_end[];
__asm__(".pushsection .rodata\n"
	"guest_begin:\n"
	"1:	rdtsc\n"
	"	shl $32, %rdx\n"
	"	or %rdx, %rax\n"
	"	mov %rax, %r10\n"
	"	mov (%rdi), %rcx\n"
	"	rdtsc\n"
	"	shl $32, %rdx\n"
	"	or %rdx, %rax\n"
	"	sub %r10, %rax\n"
	"	mov %rax, (%r9)\n"
	"	add $8, %r9\n"
	"	cmp %rcx, %r8\n"
	"	je 2f\n"
	"	inc %rbx\n"
	"2:	inc %r8\n"
	"	add $4096, %rdi\n"
	"	cmp %rsi, %rdi\n"
	"	jb 1b\n"
	"	out %al, $0x11\n"
	"guest_end:\n"
	".popsection\n");

static void fill_boot(struct vm *vm)
{
	uint64_t *pml4 = (uint64_t *)(vm->boot + PML4), *pdpt = (uint64_t *)(vm->boot + PDPT);
	uint64_t *boot = (uint64_t *)(vm->boot + PD_BOOT), *logs = (uint64_t *)(vm->boot + PD_LOGS);

	pml4[0] = PDPT | ENTRY;
	pdpt[0] = PD_BOOT | ENTRY;
	pdpt[1] = PD_LOGS | ENTRY;
	boot[0] = ENTRY_LARGE;
	for (uint64_t at = 0; at < LOG_BYTES; at += 2 * MIB)
		logs[at / (2 * MIB)] = (LOG_GPA + at) | ENTRY_LARGE;
	for (uint64_t at = 0; at < vm->pages * PAGE; at += 2 * MIB) {
		uint64_t gib = at >> 30, table = PDS_MEMORY + gib * PAGE;

		pdpt[(VM_MEMORY_GPA >> 30) + gib] = table | ENTRY;
		((uint64_t *)(vm->boot + table))[at >> 21 & 511] = (VM_MEMORY_GPA + at) | ENTRY_LARGE;
	}
	memcpy(vm->boot + CODE, guest_begin, (size_t)(guest_end - guest_begin));
}

static void add_slot(const struct vm *vm, uint32_t slot, uint64_t gpa, uint8_t *memory, size_t len)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .guest_phys_addr = gpa, .memory_size = len, .userspace_addr = (uintptr_t)memory};

	NEED(ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region) == 0);
}

static void set_cpuid(const struct vm_vcpu *vcpu)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entry[256];
	} cpuid = {.head.nent = 256};

	NEED(ioctl(vcpu->vm->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) == 0);
	NEED(ioctl(vcpu->fd, KVM_SET_CPUID2, &cpuid) == 0);
}

static void set_special_registers(const struct vm_vcpu *vcpu)
{
	struct kvm_segment code = {.limit = 0xffffffff, .selector = 0x33, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1};
	struct kvm_segment data = {.limit = 0xffffffff, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .db = 1, .s = 1, .g = 1};
	struct kvm_sregs sregs;

	NEED(ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) == 0);
	sregs.cr0 = 0x80050033; /* PG AM WP NE ET MP PE */
	sregs.cr3 = PML4;
	sregs.cr4 = 0x220;  /* OSFXSR PAE */
	sregs.efer = 0xd01; /* NXE LMA LME SCE */
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	NEED(ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) == 0);
}

static void set_registers(const struct vm_vcpu *vcpu)
{
	uint64_t at = VM_MEMORY_GPA + vcpu->first * PAGE;
	struct kvm_regs regs = {
		.rip = CODE,
		.rflags = 0x3002, /* IOPL 3, for the port */
		.rdi = at,
		.rsi = at + vcpu->count * PAGE,
		.r8 = vcpu->first + 1,
		.r9 = LOG_GPA + (uint64_t)((uint8_t *)vcpu->log - vcpu->vm->logs),
	};

	NEED(ioctl(vcpu->fd, KVM_SET_REGS, &regs) == 0);
}

static bool is_done(const struct vm_vcpu *vcpu)
{
	return vcpu->run->exit_reason == KVM_EXIT_IO && vcpu->run->io.port == DONE_PORT;
}

/* What a VMM does around KVM_RUN, with libpostcopy. */
static void run_by_exits(struct vm_vcpu *vcpu)
{
	struct postcopy *pc = vcpu->vm->pc;

	for (;;) {
		int ret = ioctl(vcpu->fd, KVM_RUN, 0);
		const struct postcopy_exit what = {ret, errno, vcpu->fd, vcpu->run};
		struct postcopy_answer answer;
		enum postcopy_action action = postcopy_adapt(pc, vcpu->index, &what, &answer);

		if (action == POSTCOPY_WAIT)
			NEED(postcopy_wait(pc, vcpu->index) == POSTCOPY_RESUMED);
		else if (action == POSTCOPY_NOT_A_FAULT && ret == 0 && is_done(vcpu))
			return;
		else
			NEED(action == POSTCOPY_RUN_AGAIN || (ret < 0 && (errno == EINTR || errno == EAGAIN)));
		vcpu->exits += action == POSTCOPY_WAIT;
	}
}

static void run_in_kernel(const struct vm_vcpu *vcpu)
{
	int ret;

	while ((ret = ioctl(vcpu->fd, KVM_RUN, 0)) != 0 || !is_done(vcpu))
		NEED(ret < 0 && (errno == EINTR || errno == EAGAIN));
}

static void *vcpu_main(void *argument)
{
	struct vm_vcpu *vcpu = argument;
	struct vm *vm = vcpu->vm;

	for (;;) {
		struct kvm_regs regs;

		pthread_barrier_wait(&vm->start);
		if (vm->quit)
			return NULL;
		set_registers(vcpu);
		vcpu->exits = 0;
		vcpu->began = now_ns();
		/* As docs/libpostcopy.md asks of a VMM; with faults in the kernel nobody would read them. */
		vcpu->run->kvm_valid_regs = vm->pc ? KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS : 0;
		if (vm->pc)
			run_by_exits(vcpu);
		else
			run_in_kernel(vcpu);
		vcpu->ended = now_ns();
		NEED(ioctl(vcpu->fd, KVM_GET_REGS, &regs) == 0);
		vcpu->wrong = regs.rbx;
		pthread_barrier_wait(&vm->end);
	}
}

static void vcpu_init(struct vm *vm, unsigned index)
{
	struct vm_vcpu *vcpu = &vm->vcpu[index];

	*vcpu = (struct vm_vcpu){.vm = vm, .index = index};
	vcpu->fd = ioctl(vm->fd, KVM_CREATE_VCPU, (unsigned long)index);
	NEED(vcpu->fd >= 0);
	vcpu->run = mmap(NULL, vm->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	NEED(vcpu->run != MAP_FAILED);
	set_cpuid(vcpu);
	set_special_registers(vcpu);
	NEED(pthread_create(&vcpu->thread, NULL, vcpu_main, vcpu) == 0);
}

static uint8_t *map_present(size_t len)
{
	uint8_t *memory = map_memory(len, false);

	memset(memory, 0, len);
	return memory;
}

void vm_init(struct vm *vm, unsigned vcpus, size_t pages)
{
	errno = EINVAL;
	NEED(vcpus && vcpus <= VM_VCPUS_MAX && pages >= vcpus && pages * PAGE <= 64ul << 30);
	*vm = (struct vm){.vcpus = vcpus, .pages = pages};
	vm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	NEED(vm->kvm >= 0);
	vm->fd = ioctl(vm->kvm, KVM_CREATE_VM, 0ul);
	NEED(vm->fd >= 0);
	NEED(ioctl(vm->fd, KVM_SET_TSS_ADDR, (unsigned long)TSS_GPA) == 0);
	vm->run_bytes = (size_t)ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0ul);
	vm->boot = map_present(BOOT_BYTES);
	vm->logs = map_present(LOG_BYTES);
	vm->memory = map_memory(pages * PAGE, true);
	fill_boot(vm);
	add_slot(vm, 0, 0, vm->boot, BOOT_BYTES);
	add_slot(vm, 1, VM_MEMORY_GPA, vm->memory, pages * PAGE);
	add_slot(vm, 2, LOG_GPA, vm->logs, LOG_BYTES);
	NEED(pthread_barrier_init(&vm->start, NULL, vcpus + 1) == 0 && pthread_barrier_init(&vm->end, NULL, vcpus + 1) == 0);
	for (unsigned i = 0; i < vcpus; i++)
		vcpu_init(vm, i);
	vm->ns_per_tick = 1e6 / ioctl(vm->vcpu[0].fd, KVM_GET_TSC_KHZ, 0);
}

void vm_deinit(struct vm *vm)
{
	vm->quit = true;
	pthread_barrier_wait(&vm->start);
	for (unsigned i = 0; i < vm->vcpus; i++) {
		pthread_join(vm->vcpu[i].thread, NULL);
		munmap(vm->vcpu[i].run, vm->run_bytes);
		close(vm->vcpu[i].fd);
	}
	close(vm->fd);
	close(vm->kvm);
	munmap(vm->memory, vm->pages * PAGE);
	munmap(vm->boot, BOOT_BYTES);
	munmap(vm->logs, LOG_BYTES);
}

void vm_forget_memory(struct vm *vm)
{
	NEED(madvise(vm->memory, vm->pages * PAGE, MADV_DONTNEED) == 0);
}

int vm_register(const struct vm *vm, bool exits)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register range = {.range = {.start = (uintptr_t)vm->memory, .len = vm->pages * PAGE},
					.mode = UFFDIO_REGISTER_MODE_MISSING};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | (exits ? UFFD_USER_MODE_ONLY : 0));

	NEED(uffd >= 0 && ioctl(uffd, UFFDIO_API, &api) == 0 && ioctl(uffd, UFFDIO_REGISTER, &range) == 0);
	return uffd;
}

void vm_unregister(const struct vm *vm, int uffd)
{
	struct uffdio_range range = {.start = (uintptr_t)vm->memory, .len = vm->pages * PAGE};

	NEED(ioctl(uffd, UFFDIO_UNREGISTER, &range) == 0 && ioctl(uffd, UFFDIO_WAKE, &range) == 0);
	close(uffd);
}

static const void *boot_memory(void *context, uint64_t gpa, size_t len)
{
	const struct vm *vm = context;

	return gpa < BOOT_BYTES && len <= BOOT_BYTES - gpa ? vm->boot + gpa : NULL;
}

void vm_connect(struct vm *vm, const char *path, int uffd, int image_fd)
{
	const struct postcopy_image image = {.fd = image_fd};
	const struct postcopy_region region = {
		.gpa = VM_MEMORY_GPA, .hva = (uintptr_t)vm->memory, .size = vm->pages * PAGE, .page_size = PAGE};
	const struct postcopy_config config = {
		.config_size = sizeof(config),
		.uffd = uffd,
		.vcpus = vm->vcpus,
		.regions = &region,
		.region_count = 1,
		.other_memory = boot_memory,
		.context = vm,
		.image = image_fd >= 0 ? &image : NULL,
	};

	errno = -postcopy_connect(path, &config, &vm->pc);
	NEED(errno == 0);
}

void vm_disconnect(struct vm *vm)
{
	postcopy_close(vm->pc);
	vm->pc = NULL;
}

static void deal_pages(struct vm *vm, bool overlap)
{
	size_t logged = 0;

	for (unsigned i = 0; i < vm->vcpus; i++) {
		struct vm_vcpu *vcpu = &vm->vcpu[i];
		size_t first = vm->pages * i / vm->vcpus, end = vm->pages * (i + 1) / vm->vcpus;

		vcpu->first = overlap ? 0 : first;
		vcpu->count = overlap ? vm->pages : end - first;
		vcpu->log = (uint64_t *)vm->logs + logged;
		logged += vcpu->count;
	}
	errno = EFBIG;
	NEED(logged * sizeof(uint64_t) <= LOG_BYTES);
}

static uint64_t cpu_ns(clockid_t clock)
{
	struct timespec t;

	NEED(clock_gettime(clock, &t) == 0);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t vm_exit_cost_ns(struct vm *vm)
{
	uint64_t ns[COST_TRIES];
	struct vm_vcpu *vcpu = &vm->vcpu[0];
	int uffd;

	vm_forget_memory(vm);
	uffd = vm_register(vm, true);
	deal_pages(vm, false);
	set_registers(vcpu);
	for (unsigned i = 0; i < COST_TRIES; i++) {
		uint64_t began = cpu_ns(CLOCK_THREAD_CPUTIME_ID);

		NEED(ioctl(vcpu->fd, KVM_RUN, 0) < 0 && errno == EFAULT);
		ns[i] = cpu_ns(CLOCK_THREAD_CPUTIME_ID) - began;
	}
	vm_unregister(vm, uffd);
	qsort(ns, COST_TRIES, sizeof(ns[0]), compare_u64);
	return ns[COST_TRIES / 2];
}

static void collect_times(const struct vm *vm, struct vm_round *round)
{
	for (unsigned i = 0; i < vm->vcpus; i++)
		round->touches += vm->vcpu[i].count;
	round->ns = malloc(round->touches * sizeof(*round->ns));
	NEED(round->ns);
	/* The logs of a round lie one behind the other. */
	for (size_t i = 0; i < round->touches; i++)
		round->ns[i] = (uint64_t)((double)((const uint64_t *)vm->logs)[i] * vm->ns_per_tick);
	qsort(round->ns, round->touches, sizeof(*round->ns), compare_u64);
}

struct vm_round vm_run(struct vm *vm, bool overlap)
{
	struct vm_round round = {0};
	uint64_t began = UINT64_MAX, ended = 0, cpu;

	deal_pages(vm, overlap);
	cpu = cpu_ns(CLOCK_PROCESS_CPUTIME_ID);
	pthread_barrier_wait(&vm->start);
	pthread_barrier_wait(&vm->end);
	round.cpu_us = (double)(cpu_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu) / 1e3 / (double)vm->pages;
	for (unsigned i = 0; i < vm->vcpus; i++) {
		const struct vm_vcpu *vcpu = &vm->vcpu[i];

		began = vcpu->began < began ? vcpu->began : began;
		ended = vcpu->ended > ended ? vcpu->ended : ended;
		round.wrong += vcpu->wrong;
		round.exits += vcpu->exits;
	}
	round.wall_s = (double)(ended - began) / 1e9;
	round.pages_s = (double)vm->pages / round.wall_s;
	collect_times(vm, &round);
	return round;
}

void vm_print_round(const struct vm_round *round)
{
	printf("{\"pages_s\": %.0f, \"cpu_us\": %.1f, \"exits\": %" PRIu64 ", \"us\": ", round->pages_s, round->cpu_us, round->exits);
	print_percentiles(round->ns, round->touches);
	putchar('}');
}
