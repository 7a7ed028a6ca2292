/* The exit ring's memory, version 1: what a VMM and the daemon share while vCPUs report absent pages as exits.
 *
 * docs/exit-ring.md is the specification; the assertions below are what ties it to the code. Little-endian hosts only, as
 * both sides run on one machine and the machines served are.
 *
 * Each vCPU has a lane to itself, so that vCPUs never wait for each other: the point of reporting by exit at all. In a
 * lane one *batch* is under way at a time: the faults [done_tail, fault_head) and their completions [done_tail, done_head).
 * The VMM moves done_tail only when the whole batch is answered, so whatever a daemon that died had taken can be read
 * again by the next one.
 */
#ifndef POSTCOPY_EXIT_RING_ABI_H
#define POSTCOPY_EXIT_RING_ABI_H

#include <stddef.h>
#include <stdint.h>

#define EXIT_RING_MAGIC 0x474e495254495845ull /* "EXITRING" */
#define EXIT_RING_VERSION 1u
#define EXIT_RING_ENTRIES 16u
#define EXIT_RING_VCPUS_MAX 4096u
#define EXIT_RING_PENDING_WORDS (EXIT_RING_VCPUS_MAX / 64)
/* 2^36 pages of 4 KiB: 256 TiB of image. */
#define EXIT_RING_RESIDENCY_MAX (1ull << 36)
#define EXIT_RING_PAGE_SHIFT 12u

/* header.features and header.accepted */
#define EXIT_RING_RESIDENCY 1ull
#define EXIT_RING_LOCAL 2ull /* vCPUs' threads may install pages themselves, from the source's own file */
#define EXIT_RING_FEATURES (EXIT_RING_RESIDENCY | EXIT_RING_LOCAL)

/* header.state */
enum exit_ring_state { EXIT_RING_SERVING = 0, EXIT_RING_COMPLETE = 1 };

/* header.local: whether a vCPU's thread may install now. Only OPEN lets it; a VMM that is not told asks the daemon. */
enum exit_ring_local {
	EXIT_LOCAL_UNSAID = 0,
	EXIT_LOCAL_OPEN = 1,
	EXIT_LOCAL_HELD = 2, /* the daemon reads the userfaultfd: whoever finishes an install rings the doorbell */
	EXIT_LOCAL_SHUT = 3, /* for good: memory was given back, so what is absent is not the image's any more */
};

/* exit_ring_fault.flags: what the access was, where it is known. */
#define EXIT_FAULT_READ 1u
#define EXIT_FAULT_WRITE 2u
#define EXIT_FAULT_EXEC 4u
#define EXIT_FAULT_FLAGS 7u

enum exit_status {
	EXIT_RESOLVED = 0, /* the page is in place: run again */
	EXIT_POISONED = 1, /* it will never come, and reads of it are machine checks */
	EXIT_STATUSES = 2,
};

/* Written by the VMM; read once by the daemon, which then works on its copy. */
struct exit_ring_fault {
	uint64_t gpa;	   /* multiple of 4096 */
	uint64_t sequence; /* its low 32 bits are the entry's index */
	uint32_t flags;
	uint32_t vcpu;
	uint64_t reserved; /* 0 */
};

struct exit_ring_completion {
	uint64_t gpa;
	uint64_t sequence;
	uint32_t status;
	uint32_t vcpu;
	uint64_t reserved; /* 0 */
};

/* Indices run freely through all 32 bits; an entry's slot is its index modulo EXIT_RING_ENTRIES. */
struct exit_ring_lane {
	/* The VMM's line. */
	uint32_t fault_head;
	uint32_t done_tail;
	uint32_t sleeping;
	uint32_t installing; /* 1: the vCPU's thread has looked at `local` or is about to, and may install */
	uint32_t reserved_vmm[12];
	/* The daemon's line. */
	uint32_t fault_tail;
	uint32_t done_head;
	uint32_t reserved_daemon[14];
	/* Both sides': a futex word that every completion and every kick of the vCPU increments. */
	uint32_t wake;
	uint32_t reserved_wake[15];
	struct exit_ring_fault fault[EXIT_RING_ENTRIES];
	struct exit_ring_completion completion[EXIT_RING_ENTRIES];
	uint32_t reserved_end[16];
};

struct exit_ring_header {
	/* Written by the VMM before the hand-off, constant from then on. */
	uint64_t magic;
	uint32_t version;
	uint32_t vcpus;
	uint64_t total_bytes;
	uint64_t features;
	uint32_t entries;
	uint32_t lane_bytes;
	uint64_t lane_offset;
	uint64_t residency_offset;
	uint64_t residency_pages;
	/* The daemon's line. */
	uint64_t accepted; /* the features that the daemon serves */
	uint32_t state;
	uint32_t local; /* enum exit_ring_local */
	uint32_t reserved_daemon[12];
	/* Both sides': 1 while the daemon wants the doorbell rung. */
	uint32_t armed;
	uint32_t reserved_armed[31];
	/* Both sides': one bit a vCPU whose lane has something new. */
	uint64_t pending[EXIT_RING_PENDING_WORDS];
};

/* A field of an entry: read or written exactly once. Entries are ordered by the indices alone; ThreadSanitizer, which sees
 * plain accesses here, checks that. */
#ifdef __SANITIZE_THREAD__
#define EXIT_ENTRY_READ(field) (field)
#define EXIT_ENTRY_WRITE(field, value) ((field) = (value))
#else
#define EXIT_ENTRY_READ(field) __atomic_load_n(&(field), __ATOMIC_RELAXED)
#define EXIT_ENTRY_WRITE(field, value) __atomic_store_n(&(field), (value), __ATOMIC_RELAXED)
#endif

_Static_assert(sizeof(struct exit_ring_fault) == 32, "fault entry");
_Static_assert(offsetof(struct exit_ring_fault, flags) == 16, "fault entry");
_Static_assert(sizeof(struct exit_ring_completion) == 32, "completion entry");
_Static_assert(offsetof(struct exit_ring_completion, status) == 16, "completion entry");
_Static_assert(offsetof(struct exit_ring_lane, installing) == 12, "lane: VMM's line");
_Static_assert(offsetof(struct exit_ring_lane, fault_tail) == 64, "lane: daemon's line");
_Static_assert(offsetof(struct exit_ring_lane, wake) == 128, "lane: futex word");
_Static_assert(offsetof(struct exit_ring_lane, fault) == 192, "lane: faults");
_Static_assert(offsetof(struct exit_ring_lane, completion) == 704, "lane: completions");
_Static_assert(sizeof(struct exit_ring_lane) == 1280, "lane: a multiple of two cache lines");
_Static_assert(offsetof(struct exit_ring_header, residency_pages) == 56, "header: geometry");
_Static_assert(offsetof(struct exit_ring_header, accepted) == 64, "header: daemon's line");
_Static_assert(offsetof(struct exit_ring_header, local) == 76, "header: daemon's line");
_Static_assert(offsetof(struct exit_ring_header, armed) == 128, "header: doorbell");
_Static_assert(offsetof(struct exit_ring_header, pending) == 256, "header: pending lanes");
_Static_assert(sizeof(struct exit_ring_header) == 768, "header");

#endif
