/* Tokens drawn from logits: guidance, temperature, top-k and top-p as mas/filter.py has them.

In: logits of one branch or of two, and a number from 0 to 1 a row. Out: a token a row. PyTorch
draws with twenty small operations, and each waits for its threads where other programs compute,
too. All but the guidance is float64; a row is drawn by one thread and depends on no other.
Axes: B rows of a branch, V vocabulary. */

#ifndef MAS_STEP_DRAW_H
#define MAS_STEP_DRAW_H

#include <math.h>
#include <stdint.h>

#include "step_threads.h"

#define SMALLEST_POWER -693.0 /* of e; what is smaller counts as 0 */

/* What to draw from and how, as mas/fast_decoder.py lays it out. */
typedef struct {
    const float *logits_BV, *others_BV; /* others: to be guided away from; NULL: no guidance */
    const double *uniform_B;
    double guidance, temperature, top_p; /* temperature 0: the likeliest token; top_p 1: all */
    int64_t top_k;                       /* the vocabulary: all */
    int64_t rows, vocabulary;
} Draw;

typedef struct {
    double weight; /* probability times the sum of all weights */
    int64_t token;
} Candidate;

typedef struct {
    const Draw *draw;
    int64_t *tokens_B;
    double *weights_BV;
    Candidate *heaps_BV;
} Drawing;

/* e^x for x ≤ 0, to 2 units of the last place. */
FAST INLINE double exponential_double(double x) {
    const double start = x < SMALLEST_POWER ? SMALLEST_POWER : x;
    const double round = 6755399441055744.0; /* 1.5 · 2^52: whoever adds it rounds */
    const double rounded = start * 1.4426950408889634 + round, power = rounded - round;
    const double rest = start - power * 0.69314718036912381649 - power * 1.90821492927058770002e-10;
    double sum = 1.0 / 6227020800.0; /* 1/13!: the series of Taylor */
    sum = sum * rest + 1.0 / 479001600.0;
    sum = sum * rest + 1.0 / 39916800.0;
    sum = sum * rest + 1.0 / 3628800.0;
    sum = sum * rest + 1.0 / 362880.0;
    sum = sum * rest + 1.0 / 40320.0;
    sum = sum * rest + 1.0 / 5040.0;
    sum = sum * rest + 1.0 / 720.0;
    sum = sum * rest + 1.0 / 120.0;
    sum = sum * rest + 1.0 / 24.0;
    sum = sum * rest + 1.0 / 6.0;
    sum = sum * rest + 0.5;
    sum = sum * rest * rest + rest + 1.0;
    union {
        double value;
        uint64_t bits; /* the lowest of `rounded` are the power */
    } scale = {.value = rounded};
    scale.bits = (scale.bits + 1023) << 52;
    return x < SMALLEST_POWER ? 0.0 : sum * scale.value;
}

/* The logits of a row after guidance, and the place of the largest, the first of equal ones. */
FAST static int64_t guide_row(const Draw *draw, int64_t row, double *logits) {
    const int64_t n = draw->vocabulary;
    const float *own = draw->logits_BV + row * n;
    if (draw->others_BV != NULL) {
        const float *others = draw->others_BV + row * n, guidance = (float)draw->guidance;
        for (int64_t v = 0; v < n; v++)
            logits[v] = others[v] + guidance * (own[v] - others[v]);
    } else
        for (int64_t v = 0; v < n; v++)
            logits[v] = own[v];
    int64_t best = 0;
    for (int64_t v = 1; v < n; v++)
        best = logits[v] > logits[best] ? v : best;
    return best;
}

/* Whether `a` comes before `b`: the likelier does, of equal ones the first of the vocabulary. */
INLINE int precedes(Candidate a, Candidate b) {
    return a.weight > b.weight || (a.weight == b.weight && a.token < b.token);
}

/* Lets the candidate at `i` of a heap sink below those that precede it. */
static void sink(Candidate *heap, int64_t count, int64_t i) {
    const Candidate sinking = heap[i];
    for (int64_t child; (child = 2 * i + 1) < count; i = child) {
        child += child + 1 < count && precedes(heap[child + 1], heap[child]);
        if (!precedes(heap[child], sinking))
            break;
        heap[i] = heap[child];
    }
    heap[i] = sinking;
}

/* Takes the first of a heap of `count` out and lays it behind the others. */
static void take_first(Candidate *heap, int64_t count) {
    const Candidate first = heap[0];
    heap[0] = heap[count - 1];
    heap[count - 1] = first;
    sink(heap, count - 1, 0);
}

/* The last candidate that top-k and top-p keep; at least one is. */
static Candidate find_last_kept(const Draw *draw, const double *weights, Candidate *heap) {
    const int64_t n = draw->vocabulary, most = draw->top_k;
    double total = 0;
    for (int64_t v = 0; v < n; v++)
        total += weights[v];
    /* All that weigh less have no more than 1 - top_p together. */
    const double floor = most < n ? 0 : (1 - draw->top_p) * total / (double)n;
    int64_t count = 0;
    for (int64_t v = 0; v < n; v++) {
        heap[count] = (Candidate){weights[v], v};
        count += weights[v] >= floor;
    }
    for (int64_t i = count / 2 - 1; i >= 0; i--)
        sink(heap, count, i);
    const Candidate *end = heap + count; /* the first taken out comes to lie before it */
    if (most < n) {
        total = 0;
        for (int64_t i = 0; i < most && count > 0; i++, count--) {
            total += heap[0].weight;
            take_first(heap, count);
        }
    }
    const double enough = draw->top_p < 1 ? draw->top_p * total : INFINITY;
    Candidate last = {0, n};
    double sum = 0;
    for (int64_t i = 1; i <= most && i <= end - heap && sum < enough; i++) {
        if (end - i < heap + count)
            take_first(heap, count--);
        last = end[-i];
        sum += last.weight;
    }
    return last;
}

/* The token at which the weights of the kept ones, in order of the vocabulary, exceed a share. */
static int64_t find_token(const double *weights, int64_t n, Candidate last, double share) {
    double total = 0, sum = 0;
    for (int64_t v = 0; v < n; v++)
        total += precedes(last, (Candidate){weights[v], v}) ? 0 : weights[v];
    int64_t token = last.token < n ? last.token : n - 1;
    for (int64_t v = 0; v < n; v++) {
        sum += precedes(last, (Candidate){weights[v], v}) ? 0 : weights[v];
        if (sum > share * total) {
            token = v;
            break;
        }
    }
    return token;
}

FAST static void draw_item(void *about, int64_t row) {
    const Drawing *drawing = about;
    const Draw *draw = drawing->draw;
    const int64_t n = draw->vocabulary;
    double *weights = drawing->weights_BV + row * n;
    const int64_t best = guide_row(draw, row, weights);
    if (draw->temperature == 0) {
        drawing->tokens_B[row] = best;
        return;
    }
    const double most = weights[best], temperature = draw->temperature;
    for (int64_t v = 0; v < n; v++)
        weights[v] = exponential_double((weights[v] - most) / temperature);
    Candidate last = {0, n};
    if (draw->top_k < n || draw->top_p < 1)
        last = find_last_kept(draw, weights, drawing->heaps_BV + row * n);
    drawing->tokens_B[row] = find_token(weights, n, last, draw->uniform_B[row]);
}

/* Bytes that `step_draw` needs beside. */
int64_t STEP(draw_bytes)(int64_t rows, int64_t vocabulary) {
    return rows * vocabulary * (int64_t)(sizeof(double) + sizeof(Candidate));
}

/* Draws a token a row; `memory`: at a whole vector. */
void STEP(draw)(const Draw *draw, int64_t *tokens_B, void *memory, int64_t threads) {
    double *weights_BV = memory;
    Candidate *heaps_BV = (Candidate *)(weights_BV + draw->rows * draw->vocabulary);
    Drawing drawing = {draw, tokens_B, weights_BV, heaps_BV};
    open_pool(threads);
    share(draw_item, &drawing, draw->rows);
    close_pool();
}

#endif
