/* The kernel as the pager asks it, for memory that is a guest_memfd with a userfault bitmap: content is written to the file,
 * and a vCPU may touch a page as soon as its bit is clear.
 *
 * The pager knows a userfaultfd only by its number, so this keeps a list of those whose memory is of this kind. Offsets in the
 * file and in the bitmap (4 KiB a bit) are those in the image.
 */
#ifndef POSTCOPY_EDGE_GUEST_MEMFD_H
#define POSTCOPY_EDGE_GUEST_MEMFD_H

#include <stdbool.h>
#include <stdint.h>

#include "ledger.h"
#include "state.h"
#include "uffd.h"

struct guest_memfd;

/* Serve `regions` (pages of 4 KiB, numbered by state_number_pages) of `uffd` through `file`. Both descriptors stay the caller's
 * and must outlive it; `bitmap` is only read from here on. NULL, with *error an errno: no memory, or the bitmap is too small
 * (ERANGE) or may be shrunk under us (EPERM). No bit is cleared before guest_memfd_arm. */
struct guest_memfd *guest_memfd_open(int uffd, int file, int bitmap, const struct region *regions, uint32_t count, int *error);
void guest_memfd_close(struct guest_memfd *memory);

/* The VMM has filled its bitmap: clear the bits of what is PRESENT already, and from now on those of what comes. */
void guest_memfd_arm(struct guest_memfd *memory, const struct ledger *ledger);

const struct uffd_edge *guest_memfd_edge(void);

#endif
