/* What a vCPU's own thread can do about an absent page: install it from the image that is at hand. */
#ifndef LIBPOSTCOPY_LOCAL_H
#define LIBPOSTCOPY_LOCAL_H

#include "handle.h"

/* Put the vCPU's wishes in place as far as that is allowed and possible; what is left of them is to be asked for. */
void local_install(struct postcopy *pc, struct vcpu_side *vcpu);

/* Write the daemon's doorbell. Never blocks. */
void ring_doorbell(struct postcopy *pc);

#endif
