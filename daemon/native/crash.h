/* Dying on purpose, for the tests: see postcopyd/crash.py. Costs a test of one variable where it is not armed. */
#ifndef POSTCOPY_CRASH_H
#define POSTCOPY_CRASH_H

#include <stdint.h>

extern uint32_t crash_left; /* passes of the armed point until death; 0: not armed */

/* Arm `name` for its nth pass; an empty name disarms. */
void crash_arm(const char *name, uint32_t nth);

void crash_pass(const char *name);

#define CRASH_POINT(name)                                \
	do {                                             \
		if (__builtin_expect(crash_left != 0, 0)) \
			crash_pass(name);                \
	} while (0)

#endif
