/* Sixteen lanes in four registers of NEON, products of bytes by its dot product (Arm since 2018).
   Numbers are those of step_avx512.h, to the bit. */

#ifndef MAS_STEP_LANES_H
#define MAS_STEP_LANES_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#define STEP(call) step_##call##_neon
#ifdef __clang__
#define FAST __attribute__((target("dotprod")))
#else
#define FAST __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define INLINE static inline __attribute__((always_inline))

#define MOST_ROWS 2 /* that are multiplied together: with 32 outputs, what registers hold */
enum {
    LANES = 16,
    VALUE_CHUNKS = 1, /* of values that are summed together, likewise */
    ZERO_POINT = 0,   /* the byte of a weight of 0 */
};

typedef struct {
    float32x4_t q[4];
} Floats;
typedef struct {
    int32x4_t q[4];
} Ints;
typedef struct {
    int8x16_t q[4];
} Weights;               /* four bytes for each of 16 outputs */
typedef int8x16_t Group; /* four inputs, for each output the same */

#define EACH(call) {{call(0), call(1), call(2), call(3)}}

FAST INLINE Floats f_all(float x) {
#define CALL(i) vdupq_n_f32(x)
    return (Floats)EACH(CALL);
#undef CALL
}
FAST INLINE Floats f_get(const float *x) {
#define CALL(i) vld1q_f32(x + 4 * i)
    return (Floats)EACH(CALL);
#undef CALL
}
FAST INLINE void f_put(float *x, Floats a) {
    for (int i = 0; i < 4; i++)
        vst1q_f32(x + 4 * i, a.q[i]);
}

#include "step_first.h"

#define OF_ONE(type, name, from, call)                                                             \
    FAST INLINE type name(from a) {                                                                \
        return (type){{call(a.q[0]), call(a.q[1]), call(a.q[2]), call(a.q[3])}};                   \
    }
#define OF_TWO(type, name, call)                                                                   \
    FAST INLINE type name(type a, type b) {                                                        \
        return (type){{call(a.q[0], b.q[0]), call(a.q[1], b.q[1]), call(a.q[2], b.q[2]),           \
                       call(a.q[3], b.q[3])}};                                                     \
    }
#define OF_THREE(name, call)                                                                       \
    FAST INLINE Floats name(Floats a, Floats b, Floats c) {                                        \
        return (Floats){{call(a.q[0], b.q[0], c.q[0]), call(a.q[1], b.q[1], c.q[1]),               \
                         call(a.q[2], b.q[2], c.q[2]), call(a.q[3], b.q[3], c.q[3])}};             \
    }

FAST INLINE float32x4_t fmadd(float32x4_t a, float32x4_t b, float32x4_t c) {
    return vfmaq_f32(c, a, b);
}
FAST INLINE float32x4_t fnmadd(float32x4_t a, float32x4_t b, float32x4_t c) {
    return vfmsq_f32(c, a, b);
}
FAST INLINE float32x4_t where_negative(float32x4_t x, float32x4_t a, float32x4_t b) {
    return vbslq_f32(vcltzq_f32(x), a, b);
}
/* a times 2 to a whole power from -150 to 128, in two steps: one factor might not be a float. */
FAST INLINE float32x4_t scale(float32x4_t a, float32x4_t power) {
    const int32x4_t bias = vdupq_n_s32(127), whole = vcvtq_s32_f32(power);
    const int32x4_t first = vshrq_n_s32(whole, 1), second = vsubq_s32(whole, first);
    const int32x4_t bits = vshlq_n_s32(vaddq_s32(first, bias), 23);
    const int32x4_t more = vshlq_n_s32(vaddq_s32(second, bias), 23);
    return vmulq_f32(vmulq_f32(a, vreinterpretq_f32_s32(bits)), vreinterpretq_f32_s32(more));
}

OF_TWO(Floats, f_add, vaddq_f32)
OF_TWO(Floats, f_sub, vsubq_f32)
OF_TWO(Floats, f_mul, vmulq_f32)
OF_TWO(Floats, f_div, vdivq_f32)
OF_TWO(Floats, f_min, vminq_f32) /* NaN: NaN */
OF_TWO(Floats, f_max, vmaxq_f32) /* NaN: NaN */
OF_TWO(Floats, f_scale, scale)
OF_ONE(Floats, f_abs, Floats, vabsq_f32)
OF_ONE(Floats, f_round, Floats, vrndnq_f32)
OF_THREE(f_fmadd, fmadd)
OF_THREE(f_fnmadd, fnmadd)
OF_THREE(f_where_negative, where_negative) /* lanes of `b` where a < 0, of `c` elsewhere */

OF_TWO(Ints, i_add, vaddq_s32)
OF_TWO(Ints, i_sub, vsubq_s32)
OF_TWO(Ints, i_max, vmaxq_s32)
OF_ONE(Ints, i_bits, Floats, vreinterpretq_s32_f32)
OF_ONE(Ints, i_truncate, Floats, vcvtq_s32_f32)
OF_ONE(Floats, i_to_floats, Ints, vcvtq_f32_s32)

/* Lanes before `n`, `other` behind them. */
FAST INLINE Floats f_first(Floats a, int64_t n, Floats other) {
    static const int32_t places[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int32x4_t count = vdupq_n_s32(n < LANES ? (int32_t)n : LANES);
#define CALL(i) vbslq_f32(vcltq_s32(vld1q_s32(places + 4 * i), count), a.q[i], other.q[i])
    return (Floats)EACH(CALL);
#undef CALL
}

/* The sum of a vector's halves, of the halves of that, … */
FAST INLINE float f_total(Floats a) {
    const float32x4_t low = vaddq_f32(a.q[0], a.q[2]), high = vaddq_f32(a.q[1], a.q[3]);
    const float32x4_t four = vaddq_f32(low, high);
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

FAST INLINE float f_most(Floats a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.q[0], a.q[1]), vmaxq_f32(a.q[2], a.q[3])));
}

/* The sum of all lanes of each of four quarters. */
FAST INLINE float32x4_t totals_quarter(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
    const float32x4_t ab = vaddq_f32(vzip1q_f32(a, b), vzip2q_f32(a, b));
    const float32x4_t cd = vaddq_f32(vzip1q_f32(c, d), vzip2q_f32(c, d));
    return vaddq_f32(vcombine_f32(vget_low_f32(ab), vget_low_f32(cd)),
                     vcombine_f32(vget_high_f32(ab), vget_high_f32(cd)));
}

/* Lane i is the sum of all lanes of `parts[i]`: of four neighbours first, then of these sums. */
FAST INLINE Floats f_totals(const Floats parts[LANES]) {
    Floats totals;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const Floats *p = parts + 4 * i;
        float32x4_t quarters[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            quarters[j] = totals_quarter(p[0].q[j], p[1].q[j], p[2].q[j], p[3].q[j]);
        totals.q[i] =
            vaddq_f32(vaddq_f32(quarters[0], quarters[1]), vaddq_f32(quarters[2], quarters[3]));
    }
    return totals;
}

/* 32 bfloat16 numbers: those at even places, and those at odd ones. */
FAST INLINE void f_get_bfloat16(const uint16_t *x, Floats *even, Floats *odd) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const uint32x4_t bits = vreinterpretq_u32_u16(vld1q_u16(x + 8 * i));
        even->q[i] = vreinterpretq_f32_u32(vshlq_n_u32(bits, 16));
        odd->q[i] = vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xffff0000)));
    }
}

FAST INLINE Ints i_all(int32_t x) {
#define CALL(i) vdupq_n_s32(x)
    return (Ints)EACH(CALL);
#undef CALL
}
FAST INLINE int32_t i_total(Ints a) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.q[0], a.q[1]), vaddq_s32(a.q[2], a.q[3])));
}
FAST INLINE int32_t i_most(Ints a) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.q[0], a.q[1]), vmaxq_s32(a.q[2], a.q[3])));
}
FAST INLINE void i_put_bytes(int8_t *x, Ints a) {
    const int16x8_t low = vcombine_s16(vqmovn_s32(a.q[0]), vqmovn_s32(a.q[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32(a.q[2]), vqmovn_s32(a.q[3]));
    vst1q_s8(x, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}

FAST INLINE Weights get_weights(const void *at) {
#define CALL(i) vld1q_s8((const int8_t *)at + 16 * i)
    return (Weights)EACH(CALL);
#undef CALL
}
FAST INLINE Group get_group(const int8_t *x) {
    int32_t group;
    memcpy(&group, x, sizeof group);
    return vreinterpretq_s8_s32(vdupq_n_s32(group));
}

/* As vdotq_s32, which clang before 16 does not know in a file for any Arm. */
FAST INLINE int32x4_t add_products_quarter(int32x4_t sum, int8x16_t weights, Group inputs) {
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(weights), "w"(inputs));
    return sum;
}
/* Adds the products of four weights and four inputs, for each output. */
FAST INLINE Ints add_products(Ints sum, Weights weights, Group inputs) {
#define CALL(i) add_products_quarter(sum.q[i], weights.q[i], inputs)
    return (Ints)EACH(CALL);
#undef CALL
}

#endif
