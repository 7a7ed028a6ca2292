/* What of a session must survive the process: one memfd, laid out here. Version 1.
 *
 * The header, then the session descriptor (JSON, written by Python), the regions, the extents, the inbox, the ledger's
 * words. Offsets are in the header, so that a later version can find the parts of an earlier one.
 */
#ifndef POSTCOPY_STATE_H
#define POSTCOPY_STATE_H

#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <stdint.h>

#include "extents.h"
#include "inflight.h"
#include "ledger.h"

#define STATE_MAGIC 0x3154415359504350ull /* "PCPYSAT1" */
#define STATE_VERSION 1u
#define STATE_REGIONS_MAX 4096u
#define STATE_INBOX_SLOTS 512u
#define STATE_DESCRIPTOR_BYTES (256u << 10)

/* Memory as it was handed over; never changes. Pages are numbered through all regions in the order of the hand-off. */
#define REGION_NO_GPA UINT64_MAX

struct region {
	uint64_t hva;
	uint64_t len_bytes;
	uint64_t image_offset;
	uint64_t first_page;
	uint64_t gpa; /* REGION_NO_GPA: the VMM did not say */
	uint32_t page_shift;
	uint32_t reserved;
};

struct counters {
	uint64_t faults;
	uint64_t faults_outside;
	uint64_t arrived[LANES]; /* pages of data installed, by the lane that asked for them */
	uint64_t zero_filled;
	uint64_t removed;
	uint64_t duplicates;
	uint64_t bad_replies;
	uint64_t stale_replies;
	uint64_t bytes_received[LANES]; /* page data */
	uint64_t retries;
	uint64_t messages;
	uint64_t exits; /* faults that came as exits */
	uint64_t reserved[18]; /* new ones take their place from here, so that the layout stays */
};

struct state_header {
	uint64_t magic;
	uint32_t version;
	uint32_t header_bytes;
	uint64_t total_bytes;
	uint64_t pages;
	uint64_t descriptor_offset; /* of the first of two places; a change is written to the one not in use */
	uint32_t descriptor_capacity; /* of each */
	uint32_t descriptor_current;  /* 0 or 1 */
	uint32_t descriptor_len[2];
	uint64_t regions_offset;
	uint32_t regions;
	uint32_t inbox_slots;
	uint64_t inbox_offset;
	uint64_t extents_offset;
	uint64_t words_offset;
	struct counters counters;
};

_Static_assert(sizeof(struct counters) == 256, "counters layout");
_Static_assert(sizeof(struct region) == 48, "region layout");
_Static_assert(sizeof(struct state_header) == 96 + sizeof(struct counters), "state header layout");

/* The header of fresh state memory for `pages` pages; its length is total_bytes. */
struct state_header state_layout(uint64_t pages);

/* Set first_page of each region and return how many pages there are; 0 if one is empty, unaligned or overflows. */
uint64_t state_number_pages(struct region *regions, uint32_t count);

/* Whether a pager can work on what another process left: of our layout, and every number in it such that no access goes
 * astray. What the ledger's words say needs no check: any value of theirs is a state. */
bool state_is_sound(const void *state, uint64_t len_bytes);

#endif
