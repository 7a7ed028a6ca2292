/* What postcopyd._native.core uses of the pager and its parts. */

/* ledger.h */
enum page_state { PAGE_MISSING, PAGE_REQUESTED, PAGE_PRESENT, PAGE_ZERO, PAGE_STATES };
enum page_event { PAGE_FAULTED, PAGE_CLAIMED, PAGE_ARRIVED, PAGE_IS_ZERO, PAGE_LOST, PAGE_REMOVED, PAGE_EVENTS };
enum page_command { PAGE_NOTHING, PAGE_FETCH, PAGE_WAIT, PAGE_INSTALL, PAGE_ZERO_FILL, PAGE_DISCARD, PAGE_COMMANDS };
struct page_transition { uint8_t next; uint8_t command; };
struct ledger { uint64_t *words; uint64_t pages; uint64_t count[4]; };
uint64_t ledger_bytes(uint64_t pages);
void ledger_init(struct ledger *ledger, uint64_t *words, uint64_t pages);
struct page_transition ledger_transition(enum page_event event, enum page_state state);
enum page_state ledger_state(const struct ledger *ledger, uint64_t page);
enum page_command ledger_apply(struct ledger *ledger, enum page_event event, uint64_t page);
uint64_t ledger_apply_range(struct ledger *ledger, enum page_event event, uint64_t first, uint64_t count);
uint64_t ledger_find(const struct ledger *ledger, enum page_state state, uint64_t first, uint64_t end);
uint64_t ledger_run(const struct ledger *ledger, unsigned mask, uint64_t first, uint64_t end);

/* uffd.h */
enum uffd_op { UFFD_OP_COPY, UFFD_OP_ZEROPAGE, UFFD_OP_CONTINUE, UFFD_OP_POISON, UFFD_OPS };
enum uffd_answer { UFFD_DONE, UFFD_PART, UFFD_THERE, UFFD_AGAIN, UFFD_UNMAPPED, UFFD_PROCESS_GONE, UFFD_NO_MEMORY,
	UFFD_NO_PAGE, UFFD_UNEXPECTED, UFFD_ANSWERS };
struct uffd_result { enum uffd_answer answer; int error; uint64_t done_bytes; };
struct uffd_msg { ...; };
struct uffd_edge {
	struct uffd_result (*install)(int fd, enum uffd_op op, uint64_t dst, uint64_t src, uint64_t len_bytes);
	int (*wake)(int fd, uint64_t start, uint64_t len_bytes);
	int (*unprotect)(int fd, uint64_t start, uint64_t len_bytes);
	int (*unregister)(int fd, uint64_t start, uint64_t len_bytes);
	ssize_t (*read)(int fd, struct uffd_msg *messages, size_t len_bytes);
	bool (*has_huge_page)(uint64_t page_bytes);
	bool (*is_changing)(int fd, uint64_t start, uint64_t len_bytes);
};
extern const struct uffd_edge uffd_kernel;
struct uffd_result uffd_classify(enum uffd_op op, int error, int64_t result, uint64_t len_bytes);
int uffd_probe_registered(int fd, uint64_t start, uint64_t len_bytes);

/* state.h */
#define STATE_VERSION ...
#define STATE_REGIONS_MAX ...
struct region { uint64_t hva; uint64_t len_bytes; uint64_t image_offset; uint64_t first_page; uint64_t gpa; uint32_t page_shift;
	uint32_t reserved; };
struct counters {
	uint64_t faults; uint64_t faults_outside; uint64_t arrived[2]; uint64_t zero_filled; uint64_t removed;
	uint64_t duplicates; uint64_t bad_replies; uint64_t stale_replies; uint64_t bytes_received[2]; uint64_t retries;
	uint64_t messages; uint64_t exits; ...;
};
struct state_header {
	uint64_t pages; uint64_t descriptor_offset; uint32_t descriptor_capacity; uint32_t descriptor_current;
	uint32_t descriptor_len[2];
	uint32_t regions; struct counters counters; ...;
};

/* pager.h */
enum lane { LANE_DEMAND, LANE_BULK, LANES };
enum pager_signal { PAGER_SEND = 1, PAGER_MORE = 2, PAGER_STALLED = 4, PAGER_GONE = 8, PAGER_SHORT = 16, PAGER_FAILED = 32,
	PAGER_DISTRUST = 64, PAGER_RING_BROKEN = 128, PAGER_ANSWERS = 256, PAGER_HELD = 512 };
struct pager_failure { uint32_t op; int32_t error; uint64_t addr; uint64_t len_bytes; };
struct pager_stats {
	uint64_t pages, missing, requested, present, zero;
	struct counters counters;
	uint64_t waiting;
	uint64_t oldest_wait_ns;
	uint64_t latency_count, latency_p50_ns, latency_p90_ns, latency_p99_ns, latency_max_ns, latency_sum_ns;
	uint64_t latency_log2_us[32];
	uint64_t bulk_inflight_bytes;
	uint64_t demand_inflight;
	uint32_t threads;
};
struct blocked_thread { uint32_t tid; uint64_t faults; uint64_t blocked_ns; ...; };
struct waiters { struct blocked_thread thread[1024]; uint32_t threads; ...; };
struct inflight { uint32_t requests[2]; ...; };
struct pager { int ring_error; struct state_header *state; struct inflight inflight; struct region *region; struct pager_failure failure; struct ledger ledger;
	struct waiters waiters; uint64_t max_range_bytes; uint32_t max_ranges; uint64_t bulk_inflight_bytes; ...; };
bool state_is_sound(const void *state, uint64_t len_bytes);
uint64_t pager_state_bytes(uint64_t pages);
struct pager *pager_create(void *state, uint64_t len_bytes, const struct region *regions, uint32_t count, int uffd,
	const struct uffd_edge *edge);
struct pager *pager_adopt(void *state, uint64_t len_bytes, int uffd, const struct uffd_edge *edge);
void pager_destroy(struct pager *pager);
unsigned pager_drain(struct pager *pager);
int pager_feed(void *context, const uint8_t *message, size_t len);
unsigned pager_retry(struct pager *pager);
unsigned pager_mark_zero(struct pager *pager, uint64_t offset, uint64_t len_bytes);
void pager_mark_present(struct pager *pager, uint64_t offset, uint64_t len_bytes);
void pager_mark_present_bitmap(struct pager *pager, const uint8_t *bitmap, uint64_t len_bytes);
unsigned pager_take_signals(struct pager *pager);
size_t pager_encode_demand(struct pager *pager, uint8_t *out, size_t capacity);
size_t pager_encode_bulk(struct pager *pager, uint64_t want_bytes, uint64_t run_bytes, uint8_t *out, size_t capacity,
	uint64_t *claimed_bytes);
void pager_reset_lane(struct pager *pager, enum lane lane);
bool pager_is_complete(const struct pager *pager);
int pager_release(struct pager *pager);
bool pager_let_go(struct pager *pager);
bool pager_poison_missing(struct pager *pager);
int pager_attach_ring(struct pager *pager, void *mem, size_t len, bool local);
unsigned pager_on_doorbell(struct pager *pager, int doorbell);
struct pager_answer { uint64_t page; uint64_t len_bytes; uint32_t vcpu; uint32_t zero; };
void pager_forward_exits(struct pager *pager);
int64_t pager_external_fault(struct pager *pager, uint64_t address, bool is_offset, uint32_t vcpu);
uint32_t pager_take_answers(struct pager *pager, struct pager_answer *out, uint32_t room);
#define ANSWERS_MAX ...
#define EXTERNAL_OUTSIDE ...
#define EXTERNAL_FULL ...
void pager_want_gpa(struct pager *pager, uint64_t gpa, uint64_t len_bytes);
const char *exit_ring_error_text(int error);
int exit_ring_map(int fd, void **mem, size_t *len);
void exit_ring_unmap(void *mem, size_t len);
uint64_t file_epoch_of(int fd);
#define WAITER_EXIT ...
#define REGION_NO_GPA ...
#define EXIT_RING_OUTSIDE ...

void pager_get_stats(const struct pager *pager, struct pager_stats *stats);

/* edge_guest_memfd.h */
struct guest_memfd;
struct guest_memfd *guest_memfd_open(int uffd, int file, int bitmap, const struct region *regions, uint32_t count, int *error);
void guest_memfd_close(struct guest_memfd *memory);
void guest_memfd_arm(struct guest_memfd *memory, const struct ledger *ledger);
const struct uffd_edge *guest_memfd_edge(void);

/* crash.h */
void crash_arm(const char *name, uint32_t nth);
