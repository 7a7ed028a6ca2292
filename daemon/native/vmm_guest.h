/*
 * The guest's machine code and the registers it lives in. It needs no stack and no memory besides the pages it
 * visits and one progress word.
 */
#ifndef VMM_GUEST_H
#define VMM_GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The guest writes to these ports; any width, the value means nothing. RDI holds the global page index. */
#define GUEST_PORT_DONE 0x10
#define GUEST_PORT_WRONG_ID 0x11
#define GUEST_PORT_WRONG_COUNTER 0x12

/* Position independent; copied to where it runs. */
extern const uint8_t guest_code[] __attribute__((visibility("hidden")));
extern const uint8_t guest_advance[] __attribute__((visibility("hidden")));
extern const uint8_t guest_commit[] __attribute__((visibility("hidden")));
extern const uint8_t guest_code_end[] __attribute__((visibility("hidden")));

static inline size_t guest_code_bytes(void)
{
	return (size_t)(guest_code_end - guest_code);
}

/*
 * Whether the page of the current tick was counted, from the instruction about to run (as an offset in the code).
 * Pages that are not counted reach `advance` too; their kind says so.
 */
static inline bool guest_has_visited(uint64_t rip_offset)
{
	return rip_offset >= (uint64_t)(guest_advance - guest_code) &&
	       rip_offset <= (uint64_t)(guest_commit - guest_code);
}

#endif
