/* What a step does to a few numbers at a time, in vectors of 16 floats. */

#ifndef MAS_STEP_VECTORS_H
#define MAS_STEP_VECTORS_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define FAST __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16 }; /* floats of a vector */

#define LAYER_EPSILON 1e-5f
#define RMS_EPSILON 1.1920929e-7f /* of float32 */

/* LayerNorm, or RMSNorm where there is no bias. */
typedef struct {
    const float *weight_D, *bias_D;
} Norm;

/* The lanes of the vector at `i` that lie before `n`. */
INLINE __mmask16 lanes(int64_t i, int64_t n) {
    return n - i >= LANES ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
}

FAST INLINE __m512 load(const float *x, int64_t i, int64_t n) {
    return _mm512_maskz_loadu_ps(lanes(i, n), x + i);
}

FAST INLINE void store(float *x, int64_t i, int64_t n, __m512 value) {
    _mm512_mask_storeu_ps(x + i, lanes(i, n), value);
}

/* e^x to 2 units of the last place; NaN stays NaN. */
FAST INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), x));
    __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), x);
    rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.9875691500e-4f); /* the polynomial of Cephes' expf */
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3981999507e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(8.3334519073e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(4.1665795894e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.6666665459e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.0000001201e-1f));
    sum = _mm512_fmadd_ps(sum, _mm512_mul_ps(rest, rest), rest);
    return _mm512_scalef_ps(_mm512_add_ps(sum, _mm512_set1_ps(1.0f)), power);
}

/* x Φ(x), Φ by Abramowitz and Stegun 7.1.26: erf to 1.5e-7. */
FAST INLINE __m512 gelu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 z = _mm512_mul_ps(x, _mm512_set1_ps(0.70710678f));
    __m512 t = _mm512_fmadd_ps(_mm512_abs_ps(z), _mm512_set1_ps(0.3275911f), one);
    t = _mm512_div_ps(one, t);
    __m512 sum = _mm512_set1_ps(1.061405429f);
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-1.453152027f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(1.421413741f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-0.284496736f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.254829592f));
    __m512 minus_square = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z));
    __m512 tail = _mm512_mul_ps(_mm512_mul_ps(sum, t), exponential(minus_square)); /* 1 - |erf| */
    __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    __m512 twice = _mm512_mask_mov_ps(_mm512_sub_ps(_mm512_set1_ps(2.0f), tail), negative, tail);
    return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)), twice);
}

FAST INLINE __m512 silu(__m512 x) {
    __m512 minus = _mm512_sub_ps(_mm512_setzero_ps(), x);
    return _mm512_div_ps(x, _mm512_add_ps(exponential(minus), _mm512_set1_ps(1.0f)));
}

/* Lane i is the sum of all lanes of `parts[i]`. */
FAST INLINE __m512 sum_each(const __m512 parts[LANES]) {
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

/* Norm of a vector of `n` numbers; `y` may be `x`. */
FAST static void normalise(const float *x, const Norm *norm, int64_t n, float *y) {
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    if (norm->bias_D != NULL)
        for (int64_t i = 0; i < n; i += LANES)
            sum = _mm512_add_ps(sum, load(x, i, n));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)n);
    for (int64_t i = 0; i < n; i += LANES) {
        __m512 away = _mm512_maskz_sub_ps(lanes(i, n), load(x, i, n), mean);
        squares = _mm512_fmadd_ps(away, away, squares);
    }
    const float epsilon = norm->bias_D != NULL ? LAYER_EPSILON : RMS_EPSILON;
    const float variance = _mm512_reduce_add_ps(squares) / (float)n;
    const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(variance + epsilon));
    for (int64_t i = 0; i < n; i += LANES) {
        __m512 unit = _mm512_mul_ps(_mm512_sub_ps(load(x, i, n), mean), factor);
        __m512 bias = norm->bias_D != NULL ? load(norm->bias_D, i, n) : _mm512_setzero_ps();
        store(y, i, n, _mm512_fmadd_ps(unit, load(norm->weight_D, i, n), bias));
    }
}

FAST INLINE __m512i to_bfloat16(__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_srli_epi32(rounded, 16);
}

FAST static void put_bfloat16(const float *x, int64_t n, uint16_t *to) {
    for (int64_t i = 0; i < n; i += LANES) {
        __m256i halves = _mm512_cvtepi32_epi16(to_bfloat16(load(x, i, n)));
        _mm256_mask_storeu_epi16(to + i, lanes(i, n), halves);
    }
}

/* Turns pairs (i, i + H/2) by their angle. */
FAST static void turn(float *x, int64_t half, const float *cosine, const float *sine) {
    for (int64_t i = 0; i < half; i += LANES) {
        __m512 a = load(x, i, half), b = load(x + half, i, half);
        __m512 c = load(cosine, i, half), s = load(sine, i, half);
        store(x, i, half, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        store(x + half, i, half, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
    }
}

#endif
