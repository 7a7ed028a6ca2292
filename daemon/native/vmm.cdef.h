enum { VMM_GUEST_KVM, VMM_GUEST_PROCESS };
enum { VMM_ORDER_SEQUENTIAL, VMM_ORDER_RANDOM };
enum { VMM_VCPU_PARKED, VMM_VCPU_RUNNING, VMM_VCPU_DONE, VMM_VCPU_FAILED };
enum { VMM_MAP_PRIVATE, VMM_MAP_SHARED, VMM_MAP_FILE, VMM_MAP_HUGETLB };

struct vmm_shape {
	uint64_t memory_bytes;
	uint64_t spare_bytes;
	uint64_t seed;
	uint64_t passes;
	uint32_t vcpus;
	uint32_t order;
};
struct vmm_walk {
	uint64_t tick;
	uint32_t visited;
};
struct vmm_vcpu_status {
	uint32_t phase;
	int32_t tid;
	uint64_t tick;
	uint64_t passes;
	uint64_t guest_errors;
	uint64_t first_error_page;
	uint32_t first_error_kind;
	int32_t run_errno;
	uint32_t exit_reason;
	uint32_t suberror;
	uint64_t rip;
};
struct vmm_check_result {
	uint64_t pages;
	uint64_t mismatched_pages;
	uint64_t first_page;
	uint32_t first_offset;
};
struct vmm;

int vmm_shape_check(const struct vmm_shape *shape);
int vmm_create(const struct vmm_shape *shape, void *memory, int guest, struct vmm **out, const char **op);
void vmm_destroy(struct vmm *vm);
int vmm_use_exits(struct vmm *vm, const char *path, int uffd, uint64_t page_size);
int vmm_start_device(struct vmm *vm);
struct vmm_exits_status {
	uint64_t annotated;
	uint64_t bare;
	uint64_t mmio;
	uint64_t emulation;
	uint64_t device_reads;
	uint32_t complete;
};
void vmm_exits_status(struct vmm *vm, struct vmm_exits_status *status);
void vmm_start(struct vmm *vm);
int vmm_pause(struct vmm *vm, unsigned timeout_ms);
int vmm_wait(struct vmm *vm, unsigned timeout_ms);
void vmm_status(struct vmm *vm, unsigned vcpu, struct vmm_vcpu_status *status);
size_t vmm_state_bytes(int guest);
int vmm_save(struct vmm *vm, unsigned vcpu, uint8_t *state);
int vmm_load(struct vmm *vm, unsigned vcpu, const uint8_t *state);
void vmm_state_walk(int guest, const uint8_t *state, struct vmm_walk *walk);
uint64_t vmm_program_id(int guest);

void vmm_fill(const struct vmm_shape *shape, uint8_t *memory);
void vmm_check(const struct vmm_shape *shape, const uint8_t *memory, const struct vmm_walk *walks,
	       const uint8_t *removed, struct vmm_check_result *result);

int vmm_map(int kind, uint64_t len_bytes, int fd, uint8_t **out);
int vmm_map_readonly(uint64_t len_bytes, int fd, uint8_t **out);
void vmm_unmap(uint8_t *memory, uint64_t len_bytes);
int vmm_discard(int kind, uint8_t *memory, uint64_t len_bytes);
void vmm_read(const uint8_t *memory, uint64_t offset, uint8_t *out, uint64_t len_bytes);
void vmm_write(uint8_t *memory, uint64_t offset, const uint8_t *data, uint64_t len_bytes);
int vmm_userfaultfd(int user_mode_only);
