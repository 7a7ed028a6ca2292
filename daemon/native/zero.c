#include "zero.h"

/*
 * The compiler lowers the vector type to what the target has, so the code is portable. The data lies at any
 * alignment in a message, hence aligned(1).
 */
typedef uint64_t wide __attribute__((vector_size(32), aligned(1), may_alias));

enum { STEP = 256 };

/* Most pages with content show it within their first bytes, so every STEP is judged by itself. */
static inline __attribute__((always_inline)) bool scan(const uint8_t *at, size_t len)
{
    for (const uint8_t *end = at + len; at < end; at += STEP) {
        const wide *w = (const wide *)at;
        wide any = (w[0] | w[1]) | (w[2] | w[3]) | (w[4] | w[5]) | (w[6] | w[7]);
        if (any[0] | any[1] | any[2] | any[3])
            return false;
    }
    return true;
}

static bool scan_portable(const uint8_t *at, size_t len)
{
    return scan(at, len);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static bool scan_avx2(const uint8_t *at, size_t len)
{
    return scan(at, len);
}

bool is_zero(const void *memory, size_t len)
{
    return __builtin_cpu_supports("avx2") ? scan_avx2(memory, len) : scan_portable(memory, len);
}
#else
bool is_zero(const void *memory, size_t len)
{
    return scan_portable(memory, len);
}
#endif

size_t run_length(const void *pages, size_t len, size_t block, bool *zero)
{
    const uint8_t *at = pages;
    size_t run = block;

    *zero = is_zero(at, block);
    while (run < len && is_zero(at + run, block) == *zero)
        run += block;
    return run;
}
