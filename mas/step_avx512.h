/* Sixteen lanes in one register of AVX-512; products of bytes by VNNI. */

#ifndef MAS_STEP_LANES_H
#define MAS_STEP_LANES_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define STEP(call) step_##call##_avx512
#define FAST __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define INLINE static inline __attribute__((always_inline))

#define MOST_ROWS 8 /* that are multiplied together: with 32 outputs, what registers hold */
enum {
    LANES = 16,
    VALUE_CHUNKS = 2, /* of values that are summed together, likewise */
    ZERO_POINT = 128, /* the byte of a weight of 0: VNNI wants them unsigned */
};

typedef __m512 Floats;
typedef __m512i Ints;
typedef __m512i Weights; /* four bytes for each of 16 outputs */
typedef __m512i Group;   /* four inputs, for each output the same */

INLINE __mmask16 before(int64_t n) {
    return n >= LANES ? 0xffff : (__mmask16)((1u << n) - 1);
}

FAST INLINE Floats f_all(float x) { return _mm512_set1_ps(x); }
FAST INLINE Floats f_get(const float *x) { return _mm512_loadu_ps(x); }
FAST INLINE void f_put(float *x, Floats a) { _mm512_storeu_ps(x, a); }
FAST INLINE Floats f_get_first(const float *x, int64_t n) {
    return _mm512_maskz_loadu_ps(before(n), x);
}
FAST INLINE void f_put_first(float *x, int64_t n, Floats a) {
    _mm512_mask_storeu_ps(x, before(n), a);
}
FAST INLINE Floats f_add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
FAST INLINE Floats f_sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
FAST INLINE Floats f_mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
FAST INLINE Floats f_div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
FAST INLINE Floats f_fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
FAST INLINE Floats f_fnmadd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
FAST INLINE Floats f_min(Floats a, Floats b) { return _mm512_min_ps(a, b); } /* NaN: b */
FAST INLINE Floats f_max(Floats a, Floats b) { return _mm512_max_ps(a, b); } /* NaN: b */
FAST INLINE Floats f_abs(Floats a) { return _mm512_abs_ps(a); }
FAST INLINE Floats f_round(Floats a) { return _mm512_roundscale_ps(a, 0); }
FAST INLINE Floats f_scale(Floats a, Floats power) { return _mm512_scalef_ps(a, power); }

/* Lanes before `n`, `other` behind them. */
FAST INLINE Floats f_first(Floats a, int64_t n, Floats other) {
    return _mm512_mask_mov_ps(other, before(n), a);
}

/* Lanes of `a` where x < 0, of `b` elsewhere. */
FAST INLINE Floats f_where_negative(Floats x, Floats a, Floats b) {
    __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(b, negative, a);
}

/* The sum of a vector's halves, of the halves of that, … */
FAST INLINE float f_total(Floats a) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

FAST INLINE float f_most(Floats a) { return _mm512_reduce_max_ps(a); }

/* Lane i is the sum of all lanes of `parts[i]`: of four neighbours first, then of these sums. */
FAST INLINE Floats f_totals(const Floats parts[LANES]) {
    __m512 fours[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512 a = parts[4 * i], b = parts[4 * i + 1], c = parts[4 * i + 2], d = parts[4 * i + 3];
        __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        fours[i] = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    }
    __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88),
                               _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
    __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88),
                                _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88),
                         _mm512_shuffle_f32x4(low, high, 0xdd));
}

/* 32 bfloat16 numbers: those at even places, and those at odd ones. */
FAST INLINE void f_get_bfloat16(const uint16_t *x, Floats *even, Floats *odd) {
    const __m512i bits = _mm512_loadu_si512(x);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)));
}

FAST INLINE Ints i_all(int32_t x) { return _mm512_set1_epi32(x); }
FAST INLINE Ints i_add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
FAST INLINE Ints i_sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
FAST INLINE Ints i_max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
FAST INLINE int32_t i_total(Ints a) { return _mm512_reduce_add_epi32(a); }
FAST INLINE int32_t i_most(Ints a) { return _mm512_reduce_max_epi32(a); }
FAST INLINE Ints i_bits(Floats a) { return _mm512_castps_si512(a); }
FAST INLINE Ints i_truncate(Floats a) { return _mm512_cvttps_epi32(a); }
FAST INLINE Floats i_to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
FAST INLINE void i_put_bytes(int8_t *x, Ints a) {
    _mm_storeu_si128((__m128i *)x, _mm512_cvtepi32_epi8(a));
}

FAST INLINE Weights get_weights(const void *at) { return _mm512_load_si512(at); }
FAST INLINE Group get_group(const int8_t *x) {
    int32_t group;
    memcpy(&group, x, sizeof group);
    return _mm512_set1_epi32(group);
}

/* Adds the products of four weights and four inputs, for each output. */
FAST INLINE Ints add_products(Ints sum, Weights weights, Group inputs) {
    return _mm512_dpbusd_epi32(sum, weights, inputs);
}

#endif
