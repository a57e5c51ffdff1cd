/* The step for AVX2 and FMA: nearly every other x86-64 since 2013. */

#define _GNU_SOURCE

#if defined(__x86_64__) && !defined(_WIN32)
#include "step_avx2.h"

#include "step_kernels.h"
#endif
