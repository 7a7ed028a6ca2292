/*
 * The smallest VMM whose guest runs before its memory is there: one vCPU that adds up a megabyte and halts.
 *
 * usage: minimal SOCKET — where a daemon is prepared with an image of 2 MiB. The guest's memory is the image; the code, page
 * tables and stack of this example lie in a slot of their own, which is always present.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libpostcopy.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

#define BOOT_BYTES 0x200000u
#define RAM_GPA 0x200000u
#define RAM_BYTES 0x200000u
#define PML4 0x1000u
#define PDPT 0x2000u
#define PD 0x3000u
#define CODE 0x4000u

struct vm {
	int kvm, vm, vcpu, uffd;
	uint8_t *boot, *ram;
	struct kvm_run *run;
};

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint8_t *memory(size_t len)
{
	void *mem = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (mem == MAP_FAILED)
		die("mmap");
	return mem;
}

/* Absent pages of `ram` are reported: those the VMM touches as events, those vCPUs touch as exits. */
static void register_ram(struct vm *vm)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
	struct uffdio_register range = { .range = { (uintptr_t)vm->ram, RAM_BYTES }, .mode = UFFDIO_REGISTER_MODE_MISSING };

	vm->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	if (vm->uffd < 0 || ioctl(vm->uffd, UFFDIO_API, &api) || ioctl(vm->uffd, UFFDIO_REGISTER, &range))
		die("userfaultfd");
}

static void add_slot(const struct vm *vm, uint32_t slot, uint64_t gpa, uint64_t len, const void *at)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .guest_phys_addr = gpa, .memory_size = len, .userspace_addr = (uintptr_t)at
	};

	if (ioctl(vm->vm, KVM_SET_USER_MEMORY_REGION, &region))
		die("KVM_SET_USER_MEMORY_REGION");
}

static void load_guest(const struct vm *vm)
{
	static const uint8_t code[] = {
		0x48, 0x03, 0x07,	  /* again: add rax, [rdi] */
		0x48, 0x83, 0xc7, 0x08,	  /* add rdi, 8 */
		0x48, 0x39, 0xf7,	  /* cmp rdi, rsi */
		0x72, 0xf4,		  /* jb again */
		0xe6, 0x11,		  /* out 0x11, al */
	};
	static const uint64_t entries[][2] = {
		{ PML4, PDPT | 7 }, { PDPT, PD | 7 }, { PD, 0 | 0x87 }, { PD + 8, RAM_GPA | 0x87 }
	};

	memcpy(vm->boot + CODE, code, sizeof(code));
	for (size_t i = 0; i < sizeof(entries) / sizeof(entries[0]); i++)
		memcpy(vm->boot + entries[i][0], &entries[i][1], 8);
}

static void make_vcpu(struct vm *vm)
{
	struct kvm_segment code = { .limit = 0xffffffff, .selector = 0x33, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1 };
	struct kvm_segment data = { .limit = 0xffffffff, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .s = 1, .db = 1, .g = 1 };
	struct kvm_regs regs = { .rip = CODE, .rflags = 0x3002, .rdi = RAM_GPA, .rsi = RAM_GPA + RAM_BYTES / 2 };
	struct kvm_sregs sregs;

	vm->vcpu = ioctl(vm->vm, KVM_CREATE_VCPU, 0);
	vm->run = mmap(NULL, (size_t)ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu, 0);
	if (vm->vcpu < 0 || vm->run == MAP_FAILED || ioctl(vm->vcpu, KVM_GET_SREGS, &sregs))
		die("vCPU");
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.cr0 = 0x80050033;
	sregs.cr3 = PML4;
	sregs.cr4 = 0x220;
	sregs.efer = 0xd01;
	if (ioctl(vm->vcpu, KVM_SET_SREGS, &sregs) || ioctl(vm->vcpu, KVM_SET_REGS, &regs))
		die("registers");
}

static const void *boot_memory(void *context, uint64_t gpa, size_t len)
{
	const struct vm *vm = context;

	return gpa < BOOT_BYTES && len <= BOOT_BYTES - gpa ? vm->boot + gpa : NULL;
}

/* image_path: NULL, or the file that the page source serves, if it is on this host. */
static struct postcopy *hand_over(struct vm *vm, const char *path, const char *image_path)
{
	const struct postcopy_image image = { .fd = image_path ? open(image_path, O_RDONLY | O_CLOEXEC) : -1 };
	const struct postcopy_region region = { .gpa = RAM_GPA, .hva = (uintptr_t)vm->ram, .size = RAM_BYTES, .page_size = 4096 };
	const struct postcopy_config config = {
		.config_size = sizeof(config),
		.uffd = vm->uffd,
		.vcpus = 1,
		.regions = &region,
		.region_count = 1,
		.other_memory = boot_memory,
		.context = vm,
		.image = image_path ? &image : NULL,
	};
	struct postcopy *pc;
	int error = postcopy_connect(path, &config, &pc);

	if (error) {
		errno = -error;
		die("postcopy_connect");
	}
	return pc;
}

/* One exit. False: the guest is done. */
static bool handle_exit(struct vm *vm, struct postcopy *pc, int ret)
{
	const struct postcopy_exit outcome = { ret, errno, vm->vcpu, vm->run };
	struct postcopy_answer answer;

	switch (postcopy_adapt(pc, 0, &outcome, &answer)) {
	case POSTCOPY_WAIT:
	case POSTCOPY_COMPLETE_MMIO:
		/* INTERRUPTED: a VMM would look here whether the vCPU shall pause. */
		while (postcopy_wait(pc, 0) == POSTCOPY_INTERRUPTED)
			;
		if (answer.action == POSTCOPY_COMPLETE_MMIO)
			postcopy_complete_mmio(pc, vm->run);
		return true;
	case POSTCOPY_RUN_AGAIN:
		return true;
	case POSTCOPY_ERROR:
		fprintf(stderr, "minimal: rip %#llx: %s\n", (unsigned long long)answer.rip, postcopy_reason_text(answer.reason));
		exit(1);
	case POSTCOPY_NOT_A_FAULT:
		break;
	}
	if (ret < 0 && errno != EINTR)
		die("KVM_RUN");
	return ret < 0 || vm->run->exit_reason != KVM_EXIT_IO;
}

int main(int argc, char **argv)
{
	struct kvm_regs regs;
	struct postcopy *pc;
	struct vm vm;

	if (argc != 2 && argc != 3) {
		fprintf(stderr, "usage: minimal SOCKET [IMAGE]\n");
		return 2;
	}
	vm.kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	vm.vm = ioctl(vm.kvm, KVM_CREATE_VM, 0);
	if (vm.vm < 0)
		die("/dev/kvm");
	vm.boot = memory(BOOT_BYTES);
	vm.ram = memory(RAM_BYTES);
	load_guest(&vm);
	register_ram(&vm);
	add_slot(&vm, 0, 0, BOOT_BYTES, vm.boot);
	add_slot(&vm, 1, RAM_GPA, RAM_BYTES, vm.ram);
	make_vcpu(&vm);
	pc = hand_over(&vm, argv[1], argc == 3 ? argv[2] : NULL);
	while (handle_exit(&vm, pc, ioctl(vm.vcpu, KVM_RUN, 0)))
		;
	if (ioctl(vm.vcpu, KVM_GET_REGS, &regs))
		die("KVM_GET_REGS");
	printf("sum %#llx\n", (unsigned long long)regs.rax);
	postcopy_close(pc);
	return 0;
}
