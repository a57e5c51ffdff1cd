/* Attention of one query to keys and values in bfloat16, in float32 and a fixed order. */

#ifndef MAS_STEP_ATTENTION_H
#define MAS_STEP_ATTENTION_H

#include "step_vectors.h"

enum {
    CHUNK = 2 * LANES,     /* bfloat16 numbers of a vector */
    BLOCK = 512,           /* keys that are read before their values */
    MOST_HEAD_WIDTH = 256, /* H */
};

/* 32 bfloat16 numbers at `i`, zeros from `n` on: those at even places, and those at odd ones. */
FAST INLINE void get_chunk(const uint16_t *x, int64_t i, int64_t n, Floats *even, Floats *odd) {
    if (n - i >= CHUNK) {
        f_get_bfloat16(x + i, even, odd);
        return;
    }
    uint16_t chunk[CHUNK] = {0};
    if (n > i)
        memcpy(chunk, x + i, (size_t)(n - i) * sizeof *x);
    f_get_bfloat16(chunk, even, odd);
}

/* Where entry `h` of a head goes when each chunk's even entries come before its odd ones. */
INLINE int64_t sorted(int64_t h) { return h / CHUNK * CHUNK + h % 2 * LANES + h % CHUNK / 2; }

/* q · keys of 16 tokens, of which the first `count` are there; -inf for the others. */
FAST INLINE Floats score(const float *q, const uint16_t *keys_TH, int64_t head_width,
                         int64_t count) {
    Floats parts[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        const uint16_t *key = keys_TH + (i < count ? i * head_width : 0);
        parts[i] = f_all(0.0f);
        for (int64_t h = 0; h < head_width; h += CHUNK) {
            Floats even, odd;
            get_chunk(key, h, head_width, &even, &odd);
            parts[i] = f_fmadd(even, f_get(q + h), parts[i]);
            parts[i] = f_fmadd(odd, f_get(q + h + LANES), parts[i]);
        }
    }
    return f_first(f_totals(parts), count, f_all(-INFINITY));
}

/* sums = sums * factor + weights · values of `count` tokens. */
FAST INLINE void add_values(float *sums, float factor, const float *weights,
                            const uint16_t *values_TH, int64_t head_width, int64_t count) {
    enum { VECTORS = 2 * VALUE_CHUNKS };
    for (int64_t h = 0; h < head_width; h += VALUE_CHUNKS * CHUNK) {
        Floats sum[2][VECTORS]; /* of every other token: a sum waits for the one before it */
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) {
            sum[0][i] = f_mul(f_get(sums + h + i * LANES), f_all(factor));
            sum[1][i] = f_all(0.0f);
        }
        for (int64_t t = 0; t < count; t += 2) {
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const int64_t token = t + i < count ? t + i : t;
                const uint16_t *value = values_TH + token * head_width;
                const Floats weight = f_all(weights[t + i]);
                Floats entries[VECTORS];
#pragma GCC unroll 2
                for (int j = 0; j < VALUE_CHUNKS; j++)
                    get_chunk(value, h + j * CHUNK, head_width, entries + 2 * j,
                              entries + 2 * j + 1);
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; j++)
                    sum[i][j] = f_fmadd(entries[j], weight, sum[i][j]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++)
            f_put(sums + h + i * LANES, f_add(sum[0][i], sum[1][i]));
    }
}

/* One query against `tokens` keys: softmax(q keysᵀ) values.

Keys, then values are read a block at a time, because memory is fastest in long runs. Weights are
relative to the largest score so far; what was summed before a larger one came is shrunk. */
FAST INLINE void attend(const float *query, const uint16_t *keys_TH, const uint16_t *values_TH,
                        int64_t head_width, int64_t tokens, float *attended) {
    float q[MOST_HEAD_WIDTH] = {0}, sums[MOST_HEAD_WIDTH] = {0}, weights[BLOCK];
    const float scale = 1.0f / sqrtf((float)head_width);
    for (int64_t h = 0; h < head_width; h++)
        q[sorted(h)] = query[h] * scale;
    Floats total = f_all(0.0f);
    float largest = -INFINITY;
    for (int64_t first = 0; first < tokens; first += BLOCK) {
        const int64_t count = tokens - first < BLOCK ? tokens - first : BLOCK;
        Floats most = f_all(largest);
        for (int64_t t = 0; t < count; t += LANES) {
            const uint16_t *keys = keys_TH + (first + t) * head_width;
            const Floats scores = score(q, keys, head_width, count - t);
            f_put(weights + t, scores);
            most = f_max(most, scores);
        }
        const float before = largest;
        largest = f_most(most);
        const Floats factor = exponential(f_all(before - largest));
        total = f_mul(total, factor);
        for (int64_t t = 0; t < count; t += LANES) {
            const Floats weight = exponential(f_sub(f_get(weights + t), f_all(largest)));
            f_put(weights + t, weight);
            total = f_add(total, weight);
        }
        float shrink[LANES];
        f_put(shrink, factor);
        add_values(sums, shrink[0], weights, values_TH + first * head_width, head_width, count);
    }
    const float share = 1.0f / f_total(total);
    for (int64_t h = 0; h < head_width; h++)
        attended[h] = sums[sorted(h)] * share;
}

#endif
