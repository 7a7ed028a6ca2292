/* Notices a vCPU that does not come forward: the same registers, faulting on the same pages, again and again. */
#ifndef LIBPOSTCOPY_GUARD_H
#define LIBPOSTCOPY_GUARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A page can be taken away again by a balloon right after it came, so a few repetitions are nothing. */
#define GUARD_REPEATS_MAX 64u
/* Exits for which no page was missing: one may have been installed by somebody else in between. */
#define GUARD_UNEXPLAINED_MAX 8u

struct guard {
	uint64_t fingerprint;
	uint32_t repeats;
	uint32_t unexplained;
};

/* FNV-1a, to be chained. */
uint64_t guard_hash(uint64_t hash, const void *data, size_t len);
#define GUARD_HASH_START 0xcbf29ce484222325ull

/* Note an exit with pages to wait for. False: it came back too often. */
bool guard_note(struct guard *guard, uint64_t fingerprint);

/* Note an exit that no missing page explains. False: it came back too often. */
bool guard_note_unexplained(struct guard *guard, uint64_t fingerprint);

#endif
