/*
 * A small virtual machine whose guest can be paused at any instruction, moved, and checked to the byte.
 *
 * The guest walks its memory for ever, or for shape.passes passes, and increments a counter in every page it visits;
 * vmm_walk.h says what the memory holds. With VMM_GUEST_KVM it is machine code on KVM vCPUs; with VMM_GUEST_PROCESS
 * plain threads make the same accesses, for hosts without /dev/kvm.
 *
 * One thread drives a vmm: start, pause, wait, save, load and destroy are not called at the same time. status and progress may
 * be called from any thread. Functions return 0 or a negative errno unless they say otherwise.
 */
#ifndef VMM_H
#define VMM_H

#include <stddef.h>
#include <stdint.h>

#define VMM_MAX_VCPUS 64
#define VMM_MAX_MEMORY (UINT64_C(256) << 30)
/* Guest physical address of the first byte of memory. */
#define VMM_MEMORY_GPA (UINT64_C(4) << 30)

enum { VMM_GUEST_KVM, VMM_GUEST_PROCESS };
enum { VMM_ORDER_SEQUENTIAL, VMM_ORDER_RANDOM };

/* DONE: shape.passes were walked. FAILED: KVM_RUN gave an outcome this VMM has no answer to; see vmm_vcpu_status. */
enum { VMM_VCPU_PARKED, VMM_VCPU_RUNNING, VMM_VCPU_DONE, VMM_VCPU_FAILED };

enum { VMM_WRONG_ID = 1, VMM_WRONG_COUNTER = 2 };

/* Sizes are multiples of 4096. The last spare_bytes of memory hold no counter: the guest never touches them. */
struct vmm_shape {
	uint64_t memory_bytes;
	uint64_t spare_bytes;
	uint64_t seed;
	uint64_t passes;
	uint32_t vcpus;
	uint32_t order;
};

/* Where a vCPU's walk is. visited: the page of this tick was counted already, the tick not yet. */
struct vmm_walk {
	uint64_t tick;
	uint32_t visited;
};

struct vmm_vcpu_status {
	uint32_t phase;
	int32_t tid;
	uint64_t tick;
	uint64_t passes;
	/* What the guest itself found wrong, and the first of it: global page index and VMM_WRONG_*. */
	uint64_t guest_errors;
	uint64_t first_error_page;
	uint32_t first_error_kind;
	/* Of a FAILED vCPU: KVM_RUN's errno or 0, its exit reason and suberror, and RIP. */
	int32_t run_errno;
	uint32_t exit_reason;
	uint32_t suberror;
	uint64_t rip;
};

/* Pages are counted from 0; offset is the byte within the first mismatched page. */
struct vmm_check_result {
	uint64_t pages;
	uint64_t mismatched_pages;
	uint64_t first_page;
	uint32_t first_offset;
};

struct vmm;

/* 0, or -EINVAL where no guest can have this shape. */
int vmm_shape_check(const struct vmm_shape *shape);

/*
 * Make a machine over `memory` (shape->memory_bytes mapped bytes, which the caller keeps until vmm_destroy). Its vCPU
 * threads exist and are parked. `*op` names what failed. Nothing of memory is touched.
 */
int vmm_create(const struct vmm_shape *shape, void *memory, int guest, struct vmm **out, const char **op);

/* Ends the vCPU threads, also those that wait for a page (see vmm_pause), and frees everything. */
void vmm_destroy(struct vmm *vm);

/*
 * Have absent pages come as exits of the vCPU that touches them, and hand memory over to the daemon at `path`. `uffd` was
 * made with UFFD_USER_MODE_ONLY and memory is registered with it. KVM guests only, before the first start.
 */
int vmm_use_exits(struct vmm *vm, const char *path, int uffd, uint64_t page_size);

/* A device that reads guest memory from a thread of its own, so that absent pages are met from outside KVM too. */
int vmm_start_device(struct vmm *vm);

/* Exits by shape (libpostcopy.h), the device's reads, and whether the daemon said that all pages are in place. */
struct vmm_exits_status {
	uint64_t annotated;
	uint64_t bare;
	uint64_t mmio;
	uint64_t emulation;
	uint64_t device_reads;
	uint32_t complete;
};
void vmm_exits_status(struct vmm *vm, struct vmm_exits_status *status);

/* Parked vCPUs run; done and failed ones stay. */
void vmm_start(struct vmm *vm);

/*
 * Take every vCPU out of the guest at an instruction boundary, also one that waits for a userfaultfd page: KVM's
 * faults are interruptible since Linux 6.2 ("kvm: x86: Allow to respond to generic signals during slow PF"); before,
 * such a vCPU parks when its page comes.
 * Returns the number of vCPUs still running after timeout_ms; they park by themselves later.
 */
int vmm_pause(struct vmm *vm, unsigned timeout_ms);

/* Returns the number of vCPUs still running when none was, or after timeout_ms. */
int vmm_wait(struct vmm *vm, unsigned timeout_ms);

void vmm_status(struct vmm *vm, unsigned vcpu, struct vmm_vcpu_status *status);

/*
 * A vCPU's registers as vmm_state_bytes(guest) opaque bytes. -EBUSY while it runs. load parks a done or failed vCPU
 * again.
 */
size_t vmm_state_bytes(int guest);
int vmm_save(struct vmm *vm, unsigned vcpu, uint8_t *state);
int vmm_load(struct vmm *vm, unsigned vcpu, const uint8_t *state);

/* What the registers say about the walk; needs no machine. */
void vmm_state_walk(int guest, const uint8_t *state, struct vmm_walk *walk);

/* Identifies the guest's machine code: registers of one program mean nothing to another. 0 for the process guest. */
uint64_t vmm_program_id(int guest);

/* Write the memory of a guest that has not run. Zero pages are not touched: memory must be fresh. */
void vmm_fill(const struct vmm_shape *shape, uint8_t *memory);

/*
 * Compare every byte of memory with what it must be when the vCPUs stand at `walks` (one each). removed: one byte a
 * page, not 0 where the page was ballooned away and must be zero; or NULL.
 */
void vmm_check(const struct vmm_shape *shape, const uint8_t *memory, const struct vmm_walk *walks,
	       const uint8_t *removed, struct vmm_check_result *result);

/* The VMM's memory, mapped: VMM_MAP_FILE maps fd shared, the others ignore it. */
enum { VMM_MAP_PRIVATE, VMM_MAP_SHARED, VMM_MAP_FILE, VMM_MAP_HUGETLB };
int vmm_map(int kind, uint64_t len_bytes, int fd, uint8_t **out);
int vmm_map_readonly(uint64_t len_bytes, int fd, uint8_t **out);
void vmm_unmap(uint8_t *memory, uint64_t len_bytes);

/*
 * Give a range back to the kernel, as a balloon does: it reads zero afterwards. With a userfaultfd that asked for
 * EVENT_REMOVE this blocks until the event is read.
 */
int vmm_discard(int kind, uint8_t *memory, uint64_t len_bytes);

/* Copy out of guest memory without holding any Python lock: blocks while a page of it is absent. */
void vmm_read(const uint8_t *memory, uint64_t offset, uint8_t *out, uint64_t len_bytes);
void vmm_write(uint8_t *memory, uint64_t offset, const uint8_t *data, uint64_t len_bytes);

/* A new userfaultfd, O_CLOEXEC | O_NONBLOCK, or a negative errno: from /dev/userfaultfd, else from the system call. */
int vmm_userfaultfd(int user_mode_only);

#endif
