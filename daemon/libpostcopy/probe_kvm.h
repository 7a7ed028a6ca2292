/* The real kernel behind postcopy_probe. */
#ifndef LIBPOSTCOPY_PROBE_KVM_H
#define LIBPOSTCOPY_PROBE_KVM_H

#include "libpostcopy.h"

extern const struct postcopy_kvm_ops probe_real_kvm __attribute__((visibility("hidden")));

#endif
