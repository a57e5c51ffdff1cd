/* Which steps this library holds, and which of them this CPU can run (step_kernels.h). */

#include <stddef.h>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#define DOT_PRODUCTS (1ul << 20) /* HWCAP_ASIMDDP */
#endif

enum { VERSION = 3 }; /* of all calls; mas/fast_decoder.py asks for the same */

int step_version(void) { return VERSION; }

/* The kinds that this CPU can run, the fastest first: the name of number `i`, NULL behind. */
const char *step_kind(int i) {
    const char *kinds[2] = {NULL};
    int count = 0;
#if defined(__x86_64__) && !defined(_WIN32)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        kinds[count++] = "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        kinds[count++] = "avx2";
#elif defined(__aarch64__) && defined(__linux__)
    if (getauxval(AT_HWCAP) & DOT_PRODUCTS)
        kinds[count++] = "neon";
#elif defined(__aarch64__) && defined(__APPLE__)
    kinds[count++] = "neon"; /* all of them can */
#endif
    return i < count ? kinds[i] : NULL;
}
