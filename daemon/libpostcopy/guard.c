#include "guard.h"

uint64_t guard_hash(uint64_t hash, const void *data, size_t len)
{
	const uint8_t *bytes = data;

	for (size_t i = 0; i < len; i++)
		hash = (hash ^ bytes[i]) * 0x100000001b3ull;
	return hash;
}

/* Whether this is another fault than the last. */
static bool is_new(struct guard *guard, uint64_t fingerprint)
{
	if (guard->fingerprint == fingerprint)
		return false;
	guard->fingerprint = fingerprint;
	guard->repeats = 0;
	guard->unexplained = 0;
	return true;
}

bool guard_note(struct guard *guard, uint64_t fingerprint)
{
	return is_new(guard, fingerprint) || ++guard->repeats < GUARD_REPEATS_MAX;
}

bool guard_note_unexplained(struct guard *guard, uint64_t fingerprint)
{
	return is_new(guard, fingerprint) || ++guard->unexplained < GUARD_UNEXPLAINED_MAX;
}
