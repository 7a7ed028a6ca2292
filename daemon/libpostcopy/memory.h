/* Guest memory as the library knows it: which page is where, and whether it is there. */
#ifndef LIBPOSTCOPY_MEMORY_H
#define LIBPOSTCOPY_MEMORY_H

#include "handle.h"

/* The region that has `gpa`, or NULL. */
const struct postcopy_region *memory_region(const struct postcopy *pc, uint64_t gpa);

/* `len` readable bytes at `gpa`, all within one region or one answer of other_memory; NULL if there are none. A page that
 * is missing is still readable: user mode waits for it as for any userfaultfd event. */
const void *memory_bytes(const struct postcopy *pc, uint64_t gpa, size_t len);

/* The page to ask for when `gpa` is missing: rounded down to its region's page size. */
uint64_t memory_page(const struct postcopy *pc, uint64_t gpa);

#endif
