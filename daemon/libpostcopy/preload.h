/* libpostcopy-preload: the memory of a VMM that knows nothing of postcopyd, handed over from inside its process.
 *
 * A block is a RAM file: it has a userfaultfd, a socket and a hand-off of its own, as every image has a migration of
 * its own. Its ranges are the mappings of it. Blocks are found in the environment before main() and live for ever.
 */
#ifndef POSTCOPY_PRELOAD_H
#define POSTCOPY_PRELOAD_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PRELOAD_BLOCKS_MAX 16
#define PRELOAD_RANGES_MAX 128

struct preload_range {
	uint64_t start;
	uint64_t len;
	uint64_t offset; /* in the file, and so in the image */
};

struct preload_block {
	char *ram;    /* path, or what it begins with */
	bool prefix;
	char *socket; /* path */

	/* From the first mapping on: */
	bool mapped;
	dev_t device;
	ino_t inode;
	uint64_t page_size;
	int uffd; /* -1 before, and when the guest needs it no more */
	size_t ranges;
	struct preload_range range[PRELOAD_RANGES_MAX]; /* as they are now */

	/* From the hand-off on. What was handed over is said again to the next daemon, with the state memory that came with
	 * the acknowledgement: the moves since are in there. */
	bool handed_over;
	size_t told;
	struct preload_range tell[PRELOAD_RANGES_MAX];
	int state; /* memfd, -1: none was given */
	int sock;  /* the keeper's */
};

struct preload {
	bool wait;    /* POSTCOPYD_WAIT: hand over when the socket appears, instead of at once */
	char *present; /* POSTCOPYD_PRESENT: bitmap of the pages that the RAM file holds already, or NULL */
	_Atomic pid_t owner; /* who mapped the first block; a forked child has this table, but not the memory. 0: nobody */
	size_t blocks;
	struct preload_block block[PRELOAD_BLOCKS_MAX];
	pthread_mutex_t lock; /* over the blocks from the first mapping on */
};

extern struct preload preload;

/* Say why this VMM cannot have its memory, and end it: going on would show its guest zeros. */
_Noreturn void preload_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
void preload_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Fill `preload` from POSTCOPYD_RAM and POSTCOPYD_SOCKET; without them it stays empty. */
void preload_configure(void);
/* Empty `fd`, the block's file of `size` bytes, but for the pages that `preload.present` names. */
void present_keep(const struct preload_block *block, int fd, uint64_t size);
/* The block whose file `fd` is, or NULL. */
struct preload_block *preload_match(int fd);

/* `len` bytes of the file `fd` from `offset` on were mapped at `start`: register them. Called under the lock. */
void block_mapped(struct preload_block *block, int fd, bool shared, struct preload_range range);
/* [start, start + len) is about to be unmapped, or replaced by another mapping. Called under the lock. */
void block_unmapping(struct preload_block *block, uint64_t start, uint64_t len);
/* [from, from + old_len) became [to, to + new_len). Called under the lock. */
void block_moved(struct preload_block *block, uint64_t from, uint64_t old_len, uint64_t to, uint64_t new_len);
/* Whether a range of the block holds `address`. Called under the lock. */
bool block_has(const struct preload_block *block, uint64_t address);

/* Hand the block over to whoever listens at its socket. 0, or -1 and errno: EPROTO if it was refused. */
int handoff(struct preload_block *block);
/* Hand the block over, now or when its socket appears, and stay with it until its memory is complete. */
void keeper_start(struct preload_block *block);

#endif
