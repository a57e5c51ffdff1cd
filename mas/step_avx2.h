/* Sixteen lanes in two registers of AVX2. Numbers are those of step_avx512.h, to the bit. */

#ifndef MAS_STEP_LANES_H
#define MAS_STEP_LANES_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define STEP(call) step_##call##_avx2
#define FAST __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline))

#define MOST_ROWS 2 /* that are multiplied together: with 32 outputs, what registers hold */
enum {
    LANES = 16,
    VALUE_CHUNKS = 1, /* of values that are summed together, likewise */
    ZERO_POINT = 0,   /* the byte of a weight of 0 */
};

typedef struct {
    __m256 low, high;
} Floats;
typedef struct {
    __m256i low, high;
} Ints;
typedef Ints Weights; /* four bytes for each of 16 outputs */
typedef struct {
    __m256i inputs, sizes; /* four of them, for each output the same; without their signs */
} Group;

#define BOTH(name, a, b) {name((a).low, (b).low), name((a).high, (b).high)}
#define BOTH3(name, a, b, c)                                                                       \
    {name((a).low, (b).low, (c).low), name((a).high, (b).high, (c).high)}

FAST INLINE Floats f_all(float x) { return (Floats){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
FAST INLINE Floats f_get(const float *x) {
    return (Floats){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
}
FAST INLINE void f_put(float *x, Floats a) {
    _mm256_storeu_ps(x, a.low);
    _mm256_storeu_ps(x + 8, a.high);
}

#include "step_first.h"

FAST INLINE Floats f_add(Floats a, Floats b) { return (Floats)BOTH(_mm256_add_ps, a, b); }
FAST INLINE Floats f_sub(Floats a, Floats b) { return (Floats)BOTH(_mm256_sub_ps, a, b); }
FAST INLINE Floats f_mul(Floats a, Floats b) { return (Floats)BOTH(_mm256_mul_ps, a, b); }
FAST INLINE Floats f_div(Floats a, Floats b) { return (Floats)BOTH(_mm256_div_ps, a, b); }
FAST INLINE Floats f_fmadd(Floats a, Floats b, Floats c) {
    return (Floats)BOTH3(_mm256_fmadd_ps, a, b, c);
}
FAST INLINE Floats f_fnmadd(Floats a, Floats b, Floats c) {
    return (Floats)BOTH3(_mm256_fnmadd_ps, a, b, c);
}
FAST INLINE Floats f_min(Floats a, Floats b) { return (Floats)BOTH(_mm256_min_ps, a, b); }
FAST INLINE Floats f_max(Floats a, Floats b) { return (Floats)BOTH(_mm256_max_ps, a, b); }
FAST INLINE Floats f_abs(Floats a) {
    const Floats sign = f_all(-0.0f);
    return (Floats)BOTH(_mm256_andnot_ps, sign, a);
}
FAST INLINE Floats f_round(Floats a) {
    return (Floats){_mm256_round_ps(a.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                    _mm256_round_ps(a.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

/* a times 2 to a whole power from -150 to 128, in two steps: one factor might not be a float. */
FAST INLINE __m256 scale_half(__m256 a, __m256 power) {
    const __m256i bias = _mm256_set1_epi32(127), whole = _mm256_cvtps_epi32(power);
    const __m256i first = _mm256_srai_epi32(whole, 1), second = _mm256_sub_epi32(whole, first);
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(first, bias), 23);
    const __m256i more = _mm256_slli_epi32(_mm256_add_epi32(second, bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(bits)), _mm256_castsi256_ps(more));
}
FAST INLINE Floats f_scale(Floats a, Floats power) { return (Floats)BOTH(scale_half, a, power); }

/* Lanes before `n`, `other` behind them. */
FAST INLINE Floats f_first(Floats a, int64_t n, Floats other) {
    const __m256i count = _mm256_set1_epi32(n < LANES ? (int)n : LANES);
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i high = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
    const __m256 in_low = _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, low));
    const __m256 in_high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, high));
    return (Floats){_mm256_blendv_ps(other.low, a.low, in_low),
                    _mm256_blendv_ps(other.high, a.high, in_high)};
}

FAST INLINE __m256 where_negative_half(__m256 x, __m256 a, __m256 b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
}
/* Lanes of `a` where x < 0, of `b` elsewhere. */
FAST INLINE Floats f_where_negative(Floats x, Floats a, Floats b) {
    return (Floats)BOTH3(where_negative_half, x, a, b);
}

/* The sum of a vector's halves, of the halves of that, … */
FAST INLINE float f_total(Floats a) {
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

FAST INLINE float f_most(Floats a) {
    const __m256 eight = _mm256_max_ps(a.low, a.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

/* The sum of four neighbours of each of four vectors, twice; then of the two. */
FAST INLINE __m128 totals_half(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256 four =
        _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    return _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
}

/* Lane i is the sum of all lanes of `parts[i]`: of four neighbours first, then of these sums. */
FAST INLINE Floats f_totals(const Floats parts[LANES]) {
    __m128 fours[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const Floats *p = parts + 4 * i;
        fours[i] = _mm_add_ps(totals_half(p[0].low, p[1].low, p[2].low, p[3].low),
                              totals_half(p[0].high, p[1].high, p[2].high, p[3].high));
    }
    return (Floats){_mm256_set_m128(fours[1], fours[0]), _mm256_set_m128(fours[3], fours[2])};
}

/* 32 bfloat16 numbers: those at even places, and those at odd ones. */
FAST INLINE void f_get_bfloat16(const uint16_t *x, Floats *even, Floats *odd) {
    const __m256i low = _mm256_loadu_si256((const __m256i *)x);
    const __m256i high = _mm256_loadu_si256((const __m256i *)(x + 16));
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    even->low = _mm256_castsi256_ps(_mm256_slli_epi32(low, 16));
    even->high = _mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
    odd->low = _mm256_castsi256_ps(_mm256_and_si256(low, upper));
    odd->high = _mm256_castsi256_ps(_mm256_and_si256(high, upper));
}

FAST INLINE Ints i_all(int32_t x) { return (Ints){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
FAST INLINE Ints i_add(Ints a, Ints b) { return (Ints)BOTH(_mm256_add_epi32, a, b); }
FAST INLINE Ints i_sub(Ints a, Ints b) { return (Ints)BOTH(_mm256_sub_epi32, a, b); }
FAST INLINE Ints i_max(Ints a, Ints b) { return (Ints)BOTH(_mm256_max_epi32, a, b); }
FAST INLINE int32_t i_total(Ints a) {
    int32_t lanes[8], sum = 0;
    _mm256_storeu_si256((__m256i *)lanes, _mm256_add_epi32(a.low, a.high));
    for (int i = 0; i < 8; i++)
        sum += lanes[i];
    return sum;
}
FAST INLINE int32_t i_most(Ints a) {
    int32_t lanes[8];
    _mm256_storeu_si256((__m256i *)lanes, _mm256_max_epi32(a.low, a.high));
    for (int i = 1; i < 8; i++)
        lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
}
FAST INLINE Ints i_bits(Floats a) {
    return (Ints){_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)};
}
FAST INLINE Ints i_truncate(Floats a) {
    return (Ints){_mm256_cvttps_epi32(a.low), _mm256_cvttps_epi32(a.high)};
}
FAST INLINE Floats i_to_floats(Ints a) {
    return (Floats){_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)};
}
FAST INLINE void i_put_bytes(int8_t *x, Ints a) {
    const __m128i low =
        _mm_packs_epi32(_mm256_castsi256_si128(a.low), _mm256_extracti128_si256(a.low, 1));
    const __m128i high =
        _mm_packs_epi32(_mm256_castsi256_si128(a.high), _mm256_extracti128_si256(a.high, 1));
    _mm_storeu_si128((__m128i *)x, _mm_packs_epi16(low, high));
}

FAST INLINE Weights get_weights(const void *at) {
    const __m256i *both = at;
    return (Weights){_mm256_load_si256(both), _mm256_load_si256(both + 1)};
}
FAST INLINE Group get_group(const int8_t *x) {
    int32_t group;
    memcpy(&group, x, sizeof group);
    const __m256i inputs = _mm256_set1_epi32(group);
    return (Group){inputs, _mm256_abs_epi8(inputs)};
}

/* One factor must be unsigned: the input, whose sign goes to the weight. No sum of two products
   leaves 16 bits, for neither factor is above 127 (128 would do). */
FAST INLINE __m256i add_products_half(__m256i sum, __m256i weights, Group group) {
    const __m256i turned = _mm256_sign_epi8(weights, group.inputs);
    const __m256i twos = _mm256_maddubs_epi16(group.sizes, turned);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
}
/* Adds the products of four weights and four inputs, for each output. */
FAST INLINE Ints add_products(Ints sum, Weights weights, Group group) {
    return (Ints){add_products_half(sum.low, weights.low, group),
                  add_products_half(sum.high, weights.high, group)};
}

#endif
