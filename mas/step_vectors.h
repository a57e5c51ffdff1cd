/* What a step does to a few numbers at a time, in vectors of 16 floats, whose header comes before. */

#ifndef MAS_STEP_VECTORS_H
#define MAS_STEP_VECTORS_H

#include <math.h>
#include <stdint.h>

#define LAYER_EPSILON 1e-5f
#define RMS_EPSILON 1.1920929e-7f /* of float32 */

/* LayerNorm, or RMSNorm where there is no bias. */
typedef struct {
    const float *weight_D, *bias_D;
} Norm;

/* The vector at `i`; zeros from `n` on. */
FAST INLINE Floats load(const float *x, int64_t i, int64_t n) { return f_get_first(x + i, n - i); }

FAST INLINE void store(float *x, int64_t i, int64_t n, Floats value) {
    f_put_first(x + i, n - i, value);
}

/* e^x to 2 units of the last place; NaN stays NaN. */
FAST INLINE Floats exponential(Floats x) {
    x = f_max(f_all(-104.0f), f_min(f_all(89.0f), x));
    const Floats power = f_round(f_mul(x, f_all(1.44269504f)));
    Floats rest = f_fnmadd(power, f_all(0.693359375f), x);
    rest = f_fnmadd(power, f_all(-2.12194440e-4f), rest);
    Floats sum = f_all(1.9875691500e-4f); /* the polynomial of Cephes' expf */
    sum = f_fmadd(sum, rest, f_all(1.3981999507e-3f));
    sum = f_fmadd(sum, rest, f_all(8.3334519073e-3f));
    sum = f_fmadd(sum, rest, f_all(4.1665795894e-2f));
    sum = f_fmadd(sum, rest, f_all(1.6666665459e-1f));
    sum = f_fmadd(sum, rest, f_all(5.0000001201e-1f));
    sum = f_fmadd(sum, f_mul(rest, rest), rest);
    return f_scale(f_add(sum, f_all(1.0f)), power);
}

/* x Φ(x), Φ by Abramowitz and Stegun 7.1.26: erf to 1.5e-7. */
FAST INLINE Floats gelu(Floats x) {
    const Floats one = f_all(1.0f), z = f_mul(x, f_all(0.70710678f));
    const Floats t = f_div(one, f_fmadd(f_abs(z), f_all(0.3275911f), one));
    Floats sum = f_all(1.061405429f);
    sum = f_fmadd(sum, t, f_all(-1.453152027f));
    sum = f_fmadd(sum, t, f_all(1.421413741f));
    sum = f_fmadd(sum, t, f_all(-0.284496736f));
    sum = f_fmadd(sum, t, f_all(0.254829592f));
    const Floats minus_square = f_sub(f_all(0.0f), f_mul(z, z));
    const Floats tail = f_mul(f_mul(sum, t), exponential(minus_square)); /* 1 - |erf| */
    const Floats twice = f_where_negative(x, tail, f_sub(f_all(2.0f), tail));
    return f_mul(f_mul(x, f_all(0.5f)), twice);
}

FAST INLINE Floats silu(Floats x) {
    const Floats minus = f_sub(f_all(0.0f), x);
    return f_div(x, f_add(exponential(minus), f_all(1.0f)));
}

/* Norm of a vector of `n` numbers; `y` may be `x`. */
FAST static void normalise(const float *x, const Norm *norm, int64_t n, float *y) {
    const Floats zeros = f_all(0.0f);
    Floats sum = zeros, squares = zeros;
    if (norm->bias_D != NULL)
        for (int64_t i = 0; i < n; i += LANES)
            sum = f_add(sum, load(x, i, n));
    const Floats mean = f_all(f_total(sum) / (float)n);
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats away = f_first(f_sub(load(x, i, n), mean), n - i, zeros);
        squares = f_fmadd(away, away, squares);
    }
    const float epsilon = norm->bias_D != NULL ? LAYER_EPSILON : RMS_EPSILON;
    const float variance = f_total(squares) / (float)n;
    const Floats factor = f_all(1.0f / sqrtf(variance + epsilon));
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats unit = f_mul(f_sub(load(x, i, n), mean), factor);
        const Floats bias = norm->bias_D != NULL ? load(norm->bias_D, i, n) : zeros;
        store(y, i, n, f_fmadd(unit, load(norm->weight_D, i, n), bias));
    }
}

/* To the nearest, ties to even. */
FAST static void put_bfloat16(const float *x, int64_t n, uint16_t *to) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        to[i] = (uint16_t)(x[i] == x[i] ? rounded : 0x7fc0);
    }
}

/* Turns pairs (i, i + H/2) by their angle. */
FAST static void turn(float *x, int64_t half, const float *cosine, const float *sine) {
    for (int64_t i = 0; i < half; i += LANES) {
        const Floats a = load(x, i, half), b = load(x + half, i, half);
        const Floats c = load(cosine, i, half), s = load(sine, i, half);
        store(x, i, half, f_fnmadd(b, s, f_mul(a, c)));
        store(x + half, i, half, f_fmadd(a, s, f_mul(b, c)));
    }
}

#endif
