/*
 * libFuzzer target: a guest that is out to break the VMM which asks what its instruction touches.
 *
 * The input is the guest's registers and the first pages of its memory: code, page tables, whatever they make of it. The
 * resolver may read nothing but guest memory (which ends where AddressSanitizer notices), and names only pages of it.
 */
#include <errno.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "../../daemon/libpostcopy/handle.h"
#include "../../daemon/libpostcopy/resolve.h"

#define PAGES 8u
#define BYTES (PAGES << 12)

static struct cpu_state cpu;
static struct kvm_run run;

int __wrap_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	void *out;

	(void)fd;
	va_start(arguments, request);
	out = va_arg(arguments, void *);
	va_end(arguments);
	if (request == KVM_GET_REGS)
		memcpy(out, &cpu.regs, sizeof(cpu.regs));
	else if (request == KVM_GET_SREGS)
		memcpy(out, &cpu.sregs, sizeof(cpu.sregs));
	else
		return -1;
	return 0;
}

static size_t take(void *out, size_t len, const uint8_t **data, size_t *size)
{
	size_t taken = len < *size ? len : *size;

	memcpy(out, *data, taken);
	*data += taken;
	*size -= taken;
	return taken;
}

/* The first byte chooses the mode, as few random registers make one that decodes. */
static void set_mode(uint8_t mode)
{
	memset(&cpu.sregs, 0, sizeof(cpu.sregs));
	cpu.sregs.cs.l = mode & 1;
	cpu.sregs.cs.db = cpu.sregs.ss.db = mode >> 1 & 1;
	cpu.sregs.efer = mode & 1 ? 1 << 10 : 0;
	cpu.sregs.cr0 = mode & 4 ? 1u << 31 : 0;
	cpu.sregs.cr4 = (mode & 8 ? 1 << 5 : 0) | (mode & 16 ? 1 << 12 : 0) | (mode & 32 ? 1 << 4 : 0);
	cpu.sregs.cr3 = 0x1000;
	run.exit_reason = mode & 64 ? KVM_EXIT_INTERNAL_ERROR : 0;
	run.internal.suberror = KVM_INTERNAL_ERROR_EMULATION;
}

static void look(struct postcopy *pc)
{
	const struct postcopy_exit bare = { -1, EFAULT, -1, &run }, emulation = { 0, 0, -1, &run };
	struct postcopy_answer answer;

	postcopy_adapt(pc, 0, run.exit_reason ? &emulation : &bare, &answer);
	if (answer.count > POSTCOPY_PAGES_MAX || (answer.action == POSTCOPY_WAIT) != (answer.count > 0))
		abort();
	for (uint32_t i = 0; i < answer.count; i++) {
		if (answer.gpa[i] >= BYTES || answer.gpa[i] % 4096)
			abort();
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct vcpu_side vcpu;
	size_t len = exit_ring_bytes(1, PAGES);
	uint8_t *memory = aligned_alloc(4096, BYTES), *ring = aligned_alloc(4096, len), mode = 0;
	struct postcopy_region region = { 0, (uintptr_t)memory, BYTES, 0, 4096 };
	struct postcopy pc = { .region = &region, .regions = 1, .vcpu = &vcpu };
	uint64_t resident = 0;

	memset(memory, 0, BYTES);
	memset(ring, 0, len);
	exit_ring_format(&pc.ring, ring, 1, PAGES, false);
	pc.ring.header->accepted = EXIT_RING_RESIDENCY;
	take(&mode, 1, &data, &size);
	set_mode(mode);
	take(&resident, 1, &data, &size);
	memcpy(ring + pc.ring.header->residency_offset, &resident, sizeof(resident));
	take(&cpu.regs, sizeof(cpu.regs), &data, &size);
	if (mode & 128)
		cpu.regs.rip &= 0x1fff;
	take(memory, BYTES, &data, &size);
	memset(&vcpu.guard, 0, sizeof(vcpu.guard));
	look(&pc);
	free(memory);
	free(ring);
	return 0;
}
