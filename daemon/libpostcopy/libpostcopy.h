/* libpostcopy: vCPU memory-fault exits for VMMs whose guest runs before its memory is there.
 *
 * A VMM registers guest memory with a userfaultfd made with UFFD_USER_MODE_ONLY (no privilege, no kernel patch). Then a vCPU
 * that touches an absent page does not sleep in the kernel: KVM_RUN returns, in one of several shapes, and the VMM's own
 * touches still are ordinary userfaultfd events. This library turns every such shape into "this vCPU waits for these pages",
 * asks the page-fault daemon for them over shared memory, and sleeps until they are in place.
 *
 *	postcopy_connect(path, &config, &pc);			once, before the first KVM_RUN
 *	postcopy_populate(pc, 0);				the pinned set
 *	for (;;) {						each vCPU's thread
 *		int ret = ioctl(vcpu_fd, KVM_RUN, 0);
 *		struct postcopy_exit exit = { ret, errno, vcpu_fd, run };
 *		switch (postcopy_adapt(pc, vcpu, &exit, &answer)) { … }
 *	}
 *
 * docs/libpostcopy.md has the whole story, examples/minimal.c a whole VMM.
 *
 * Threads: functions that take a `vcpu` are called by one thread at a time for each vCPU; different vCPUs never wait for each
 * other. postcopy_kick, postcopy_is_missing and postcopy_is_complete may be called by any thread.
 */
#ifndef LIBPOSTCOPY_H
#define LIBPOSTCOPY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The most pages that one exit is answered with; an instruction that needs more exits again. */
#define POSTCOPY_PAGES_MAX 16u

#ifdef __GNUC__
#pragma GCC visibility push(default)
#endif

struct postcopy;

/* Guest memory that is registered with the userfaultfd. Bytes; all but `page_size` multiples of it. */
struct postcopy_region {
	uint64_t gpa;
	uint64_t hva;
	uint64_t size;
	uint64_t image_offset; /* where its content lies in the image at the source */
	uint64_t page_size;    /* 4096, or that of the hugetlb pages behind it */
};

struct postcopy_range {
	uint64_t gpa;
	uint64_t size;
};

/* The file that the page source serves, at hand: pages lie in it at their image_offset. */
struct postcopy_image {
	int fd; /* readable; stays the caller's */
};

struct postcopy_config {
	size_t config_size; /* sizeof(struct postcopy_config) */
	int uffd;	    /* stays the caller's; the library keeps a duplicate */
	uint32_t vcpus;
	const struct postcopy_region *regions;
	size_t region_count;
	/* What the kernel itself reads and so must never be absent: see docs/libpostcopy.md, "The pinned set". */
	const struct postcopy_range *pinned;
	size_t pinned_count;
	/* Guest memory outside the regions, for reading code and page tables: `len` bytes at `gpa`, or NULL. May be NULL. */
	const void *(*other_memory)(void *context, uint64_t gpa, size_t len);
	void *context;
	uint32_t timeout_ms; /* for the daemon's acknowledgement; 0: 5 s */
	/* NULL: none. With it a vCPU's own thread installs what its exit was about, if the daemon finds the file to be the
	 * source's own; else, and for everything else, it asks. See docs/libpostcopy.md, "The image at hand". */
	const struct postcopy_image *image;
};

/* Hand the memory over to the daemon that listens at `path` and wait for its acknowledgement. Config and path are copied.
 * 0 and *out, or -errno: -ECONNREFUSED, -ENOENT: nobody listens; -EPROTO: refused, the daemon's log says why; -ETIMEDOUT;
 * -EINVAL: the config makes no sense; -EMSGSIZE: more regions than a hand-off can hold. */
int postcopy_connect(const char *path, const struct postcopy_config *config, struct postcopy **out);

/* Let go. The last close of a userfaultfd makes absent pages read as zeros, so: only when complete, or with the guest. */
void postcopy_close(struct postcopy *pc);

/* Whether the daemon said that everything is in place; from then on no exit is a missing page. */
bool postcopy_is_complete(const struct postcopy *pc);

/* Hand the same descriptors over again, to a daemon that was restarted. What vCPUs wait for is not lost. As
 * postcopy_connect. */
int postcopy_reattach(struct postcopy *pc);

/* Stay with the daemon: hand over again whenever it goes, until it says complete or postcopy_stop_watch. For a thread of its
 * own. 0: complete; -ECANCELED: stopped. */
int postcopy_watch(struct postcopy *pc);
void postcopy_stop_watch(struct postcopy *pc);

/* --- a vCPU ----------------------------------------------------------------------------------------------------- */

/* What KVM_RUN gave. Set KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS in run->kvm_valid_regs once, if KVM_CAP_SYNC_REGS has both:
 * then an exit's registers are at hand, and asking for them costs no system calls. */
struct postcopy_exit {
	int ret;     /* of the ioctl */
	int error;   /* errno, if ret < 0 */
	int vcpu_fd;
	void *run;   /* struct kvm_run * */
};

enum postcopy_action {
	POSTCOPY_NOT_A_FAULT,	/* none of ours: handle the exit as ever */
	POSTCOPY_WAIT,		/* postcopy_wait, then KVM_RUN */
	POSTCOPY_COMPLETE_MMIO, /* postcopy_wait, then postcopy_complete_mmio, then KVM_RUN; never show it to a device */
	POSTCOPY_RUN_AGAIN,	/* the page came meanwhile: KVM_RUN */
	POSTCOPY_ERROR,		/* running again cannot help: answer.reason */
};

enum postcopy_shape {
	POSTCOPY_SHAPE_NONE,
	POSTCOPY_SHAPE_ANNOTATED, /* KVM_EXIT_MEMORY_FAULT */
	POSTCOPY_SHAPE_BARE,	  /* EFAULT and nothing else */
	POSTCOPY_SHAPE_MMIO,	  /* KVM_EXIT_MMIO on RAM */
	POSTCOPY_SHAPE_EMULATION, /* KVM_EXIT_INTERNAL_ERROR, emulation */
	POSTCOPY_SHAPES,
};

enum postcopy_reason {
	POSTCOPY_REASON_NONE,
	POSTCOPY_REASON_GATHER,	     /* a gather or scatter: its addresses lie in a vector register, which is not read */
	POSTCOPY_REASON_UNDECODED,   /* the instruction at RIP is not known */
	POSTCOPY_REASON_UNREADABLE,  /* the instruction or its registers cannot be read */
	POSTCOPY_REASON_UNEXPLAINED, /* every page that the instruction needs is there, and KVM fails all the same */
	POSTCOPY_REASON_NO_PROGRESS, /* the same fault comes back although its pages were installed */
	POSTCOPY_REASON_POISONED,    /* the page is lost */
	POSTCOPY_REASON_BAD_ACCESS,  /* an MMIO access that no memory access can be */
	POSTCOPY_REASONS,
};

struct postcopy_answer {
	enum postcopy_action action;
	enum postcopy_shape shape;
	enum postcopy_reason reason;
	uint32_t count; /* pages to wait for */
	uint64_t gpa[POSTCOPY_PAGES_MAX];
	uint64_t rip; /* where it was looked at */
};

/* Say what an exit of KVM_RUN is and note what the vCPU has to wait for. Never blocks. The same as answer->action. */
enum postcopy_action postcopy_adapt(struct postcopy *pc, uint32_t vcpu, const struct postcopy_exit *exit,
				    struct postcopy_answer *answer);

enum postcopy_wait {
	POSTCOPY_RESUMED,     /* all pages are in place */
	POSTCOPY_INTERRUPTED, /* by a signal or postcopy_kick; call again to go on waiting for the same pages */
	POSTCOPY_LOST,	      /* a page is lost for ever: running on gives the guest a machine check */
	POSTCOPY_BROKEN,      /* the daemon's answers make no sense */
};

/* Wait until all that postcopy_adapt named is in place. Returns at once if there is nothing to wait for. */
enum postcopy_wait postcopy_wait(struct postcopy *pc, uint32_t vcpu);

/* Make the vCPU's present or next postcopy_wait (or postcopy_populate) return POSTCOPY_INTERRUPTED. Any thread, also from a
 * signal handler. Whoever kicks a vCPU out of KVM_RUN calls this too, as it cannot know which of the two it is in. */
void postcopy_kick(struct postcopy *pc, uint32_t vcpu);

/* Do the access of a KVM_EXIT_MMIO on RAM, from or to guest memory. False: POSTCOPY_REASON_BAD_ACCESS. */
bool postcopy_complete_mmio(struct postcopy *pc, void *run);

/* Have the pinned set fetched, through the lane of `vcpu`, before any vCPU runs. After POSTCOPY_INTERRUPTED call again. */
enum postcopy_wait postcopy_populate(struct postcopy *pc, uint32_t vcpu);

/* Whether the page at `gpa` is registered memory that the daemon has not said to be in place. */
bool postcopy_is_missing(const struct postcopy *pc, uint64_t gpa);

/* One sentence for a log. */
const char *postcopy_reason_text(enum postcopy_reason reason);

/* --- what this kernel can do ------------------------------------------------------------------------------------ */

enum postcopy_method {
	POSTCOPY_METHOD_NONE,		 /* absent pages cannot be made to exit here */
	POSTCOPY_METHOD_USER_MODE_ONLY,	 /* stock kernel: userfaultfd with UFFD_USER_MODE_ONLY, bare EFAULT */
	POSTCOPY_METHOD_EXIT_ON_MISSING, /* out of tree: memslot flag 1 << 3, annotated */
	POSTCOPY_METHOD_USERFAULT,	 /* out of tree: the same flag with a bitmap, annotated */
};

/* The edge to the kernel, so that kernels which are not here can be played. Calls as their namesakes: -1 and errno. */
struct postcopy_kvm_ops {
	void *context;
	int (*open_kvm)(void *context);
	int (*ioctl)(void *context, int fd, unsigned long request, uintptr_t arg);
	void *(*map)(void *context, int fd, size_t len); /* struct kvm_run; NULL on failure */
	void (*unmap)(void *context, void *mem, size_t len);
	void (*close)(void *context, int fd);
	/* A userfaultfd with UFFD_USER_MODE_ONLY. */
	int (*open_userfaultfd)(void *context);
};

struct postcopy_probe_result {
	enum postcopy_method method; /* the best that was proved */
	bool claims_exit_on_missing; /* a capability of that name's numbers is advertised; numbers moved, so this is no proof */
	bool claims_userfault;
	int error; /* errno of what kept the probe from finding out more, or 0 */
};

/* Find out by trying, with a VM of one page; never by version. `ops` NULL: the real kernel. */
void postcopy_probe(const struct postcopy_kvm_ops *ops, struct postcopy_probe_result *result);

/* POSTCOPY_METHOD_USERFAULT: the pages are populated, let vCPUs touch them. `bitmap` has a bit for each page of the memslot,
 * set: exit. Everything written to the pages before is visible to who finds the bits clear. */
void postcopy_userfault_clear(uint64_t *bitmap, uint64_t first_page, uint64_t count);

#ifdef __GNUC__
#pragma GCC visibility pop
#endif

#ifdef __cplusplus
}
#endif

#endif
