/* The calls of a VMM that make, drop and move mappings, with guest RAM picked out of them.
 *
 * The calls go to the kernel directly: looking up the C library's own would need its allocator, which may not be
 * ready, and may map memory itself. Where no variable is set nothing else is done.
 */
#define _GNU_SOURCE
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload.h"

#define INTERPOSED __attribute__((visibility("default")))

_Static_assert(sizeof(off_t) == 8 && sizeof(void *) == 8, "offsets and addresses are passed in one register");

__attribute__((constructor)) static void begin(void)
{
	preload_configure();
}

/* Whether guest RAM is mapped, by this very process. */
static bool is_owner(void)
{
	return preload.owner && preload.owner == getpid();
}

/* The VMM is about to drop, or replace, whatever lies there. */
static void unmapping(void *start, size_t len)
{
	pthread_mutex_lock(&preload.lock);
	for (size_t i = 0; i < preload.blocks; i++) {
		if (preload.block[i].ranges)
			block_unmapping(&preload.block[i], (uintptr_t)start, len);
	}
	pthread_mutex_unlock(&preload.lock);
}

static void mapped(void *start, size_t len, int flags, int fd, off_t offset)
{
	struct preload_block *block = preload_match(fd);
	bool is_first;

	if (!block)
		return;
	if (preload.owner && !is_owner())
		preload_fail("%s is mapped by a child of the VMM; only one process can have absent memory", block->ram);
	pthread_mutex_lock(&preload.lock);
	preload.owner = getpid();
	is_first = !block->mapped;
	block_mapped(block, fd, (flags & MAP_TYPE) != MAP_PRIVATE,
		     (struct preload_range){ (uintptr_t)start, len, (uint64_t)offset });
	pthread_mutex_unlock(&preload.lock);
	if (is_first)
		keeper_start(block);
}

INTERPOSED void *mmap64(void *start, size_t len, int prot, int flags, int fd, off_t offset)
{
	void *at;

	if (flags & MAP_FIXED && is_owner())
		unmapping(start, len);
	at = (void *)syscall(SYS_mmap, start, len, prot, flags, fd, offset);
	if (at != MAP_FAILED && fd >= 0 && !(flags & MAP_ANONYMOUS) && preload.blocks)
		mapped(at, len, flags, fd, offset);
	return at;
}

INTERPOSED void *mmap(void *start, size_t len, int prot, int flags, int fd, off_t offset)
{
	return mmap64(start, len, prot, flags, fd, offset);
}

INTERPOSED int munmap(void *start, size_t len)
{
	if (is_owner())
		unmapping(start, len);
	return (int)syscall(SYS_munmap, start, len);
}

/* Before the hand-off nobody would read of the move, and the hand-off would name the old place. */
static void moving(uintptr_t start)
{
	pthread_mutex_lock(&preload.lock);
	for (size_t i = 0; i < preload.blocks; i++) {
		if (!preload.block[i].handed_over && block_has(&preload.block[i], start))
			preload_fail("%s is moved by mremap before its hand-off", preload.block[i].ram);
	}
	pthread_mutex_unlock(&preload.lock);
}

INTERPOSED void *mremap(void *start, size_t old_len, size_t new_len, int flags, ...)
{
	va_list arguments;
	void *to, *wanted;

	va_start(arguments, flags);
	wanted = flags & MREMAP_FIXED ? va_arg(arguments, void *) : NULL;
	va_end(arguments);
	if (!is_owner())
		return (void *)syscall(SYS_mremap, start, old_len, new_len, flags, wanted);
	if (flags & MREMAP_FIXED)
		unmapping(wanted, new_len);
	moving((uintptr_t)start);
	/* The kernel reports the move to the daemon, and goes on when that has read it. */
	to = (void *)syscall(SYS_mremap, start, old_len, new_len, flags, wanted);
	if (to == MAP_FAILED)
		return to;
	pthread_mutex_lock(&preload.lock);
	for (size_t i = 0; i < preload.blocks; i++)
		block_moved(&preload.block[i], (uintptr_t)start, old_len, (uintptr_t)to, new_len);
	pthread_mutex_unlock(&preload.lock);
	return to;
}
