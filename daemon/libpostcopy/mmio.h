/* Accesses that KVM took for a device's and that belong to memory. */
#ifndef LIBPOSTCOPY_MMIO_H
#define LIBPOSTCOPY_MMIO_H

#include <linux/kvm.h>

#include "handle.h"

/* Whether the KVM_EXIT_MMIO in `run` can be done in memory: 1 to 8 bytes within one page of one region. KVM splits an access at
 * page boundaries and gives a longer one in pieces. */
bool mmio_is_memory_access(const struct postcopy *pc, const struct kvm_run *run);

#endif
