#include "mmio.h"

#include <string.h>

#include "memory.h"

bool mmio_is_memory_access(const struct postcopy *pc, const struct kvm_run *run)
{
	uint64_t gpa = run->mmio.phys_addr;
	uint32_t len = run->mmio.len;

	return len >= 1 && len <= sizeof(run->mmio.data) && (gpa & (PAGE_BYTES - 1)) + len <= PAGE_BYTES &&
	       memory_region(pc, gpa) != NULL;
}

/* One access where it is aligned, so that another vCPU never sees half of it: as the hardware would. */
#define MOVE_AS(type)                                                                                                   \
	do {                                                                                                            \
		type value_;                                                                                            \
		if (is_write) {                                                                                         \
			memcpy(&value_, data, sizeof(value_));                                                          \
			__atomic_store_n((type *)place, value_, __ATOMIC_RELEASE);                                      \
		} else {                                                                                                \
			value_ = __atomic_load_n((type *)place, __ATOMIC_ACQUIRE);                                      \
			memcpy(data, &value_, sizeof(value_));                                                          \
		}                                                                                                       \
	} while (0)

static void move(void *place, uint8_t *data, uint32_t len, bool is_write)
{
	if ((uintptr_t)place % len == 0) {
		switch (len) {
		case 8:
			MOVE_AS(uint64_t);
			return;
		case 4:
			MOVE_AS(uint32_t);
			return;
		case 2:
			MOVE_AS(uint16_t);
			return;
		case 1:
			MOVE_AS(uint8_t);
			return;
		}
	}
	if (is_write)
		memcpy(place, data, len);
	else
		memcpy(data, place, len);
}

bool postcopy_complete_mmio(struct postcopy *pc, void *run_page)
{
	struct kvm_run *run = run_page;
	const struct postcopy_region *region = memory_region(pc, run->mmio.phys_addr);

	if (!mmio_is_memory_access(pc, run))
		return false;
	move((void *)(uintptr_t)(region->hva + (run->mmio.phys_addr - region->gpa)), run->mmio.data, run->mmio.len,
	     run->mmio.is_write != 0);
	return true;
}
