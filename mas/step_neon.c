/* The step for Arm with dot products of bytes: Apple's, servers since 2019. */

#define _GNU_SOURCE

#if defined(__aarch64__) && !defined(_WIN32)
#include "step_neon.h"

#include "step_kernels.h"
#endif
