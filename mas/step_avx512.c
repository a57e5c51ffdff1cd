/* The step for AVX-512 with VNNI: servers since 2019, AMD since Zen 4. */

#define _GNU_SOURCE

#if defined(__x86_64__) && !defined(_WIN32)
#include "step_avx512.h"

#include "step_kernels.h"
#endif
