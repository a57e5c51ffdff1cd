/* Products of rows of inputs in 8 bits with a packed matrix; sums are exact integers.

In: a matrix as STEP(pack) in step_kernels.h lays it out, rows of floats. Out: floats. Each output
is computed by one thread, whatever the number of threads. */

#ifndef MAS_STEP_MATRICES_H
#define MAS_STEP_MATRICES_H

#include "step_threads.h"
#include "step_vectors.h"

enum {
    GROUP = 4,             /* inputs that one instruction multiplies and adds */
    PANEL = 2 * LANES,     /* outputs that are computed together */
    PIECE_BYTES = 1 << 17, /* of weights that a thread takes at a time, at most */
    PIECES = 4,            /* a thread, at least, where there are as many panels */
    LARGEST_INT8 = 127,    /* what the largest entry of a row becomes */
};
#define SMALLEST 1e-30f /* instead of the largest entry of a row of zeros */

/* A matrix V K, packed by `step_pack`, and what an output of 1 stands for. */
typedef struct {
    const uint8_t *packed;
    const float *scale_V; /* step of the weights / LARGEST_INT8 */
    int64_t outputs, inputs;
} Matrix;

/* Rows of inputs in 8 bits. */
typedef struct {
    int8_t *bytes_RK;
    int64_t stride; /* bytes from row to row */
    float *largest_R;
    int32_t *offset_R; /* what the zero point of the weights adds to every sum */
} Inputs;

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* Zeros up to a whole vector; a vector more, so that rows do not share their places in a cache. */
static int64_t row_stride(int64_t inputs) { return round_up(inputs, 64) + 64; }

static int64_t panel_bytes(int64_t inputs) { return round_up(inputs, GROUP) * PANEL; }

static int64_t inputs_bytes(int64_t rows, int64_t inputs) {
    return round_up(rows * (row_stride(inputs) + 8), 64);
}

/* Lays `Inputs` out in a piece of memory of `inputs_bytes`. */
static Inputs place_inputs(void *memory, int64_t rows, int64_t inputs) {
    const int64_t stride = row_stride(inputs);
    float *largest_R = (float *)((int8_t *)memory + rows * stride);
    return (Inputs){memory, stride, largest_R, (int32_t *)(largest_R + rows)};
}

/* Rounds row `row` to 8 bits: its largest entry becomes ±127. As in Int8Linear, to the bit. */
FAST static void round_row(const float *x, int64_t n, const Inputs *inputs, int64_t row) {
    /* As integers floats are ordered likewise, and NaN is the largest. */
    Ints most = i_all(0);
    for (int64_t i = 0; i < n; i += LANES)
        most = i_max(most, i_bits(f_abs(load(x, i, n))));
    union {
        int32_t bits;
        float value;
    } largest = {.bits = i_most(most)};
    if (largest.value < SMALLEST)
        largest.value = SMALLEST;
    const Floats factor = f_all(LARGEST_INT8 / largest.value);
    int8_t *bytes = inputs->bytes_RK + row * inputs->stride;
    Ints sum = i_all(0);
    for (int64_t i = 0; i < inputs->stride; i += LANES) {
        Ints entries = i_all(0);
        if (i < n) {
            const Floats shifted = f_add(f_mul(load(x, i, n), factor), f_all(128.5f));
            entries = i_sub(i_truncate(shifted), i_all(128));
        }
        sum = i_add(sum, entries);
        i_put_bytes(bytes + i, entries);
    }
    inputs->largest_R[row] = largest.value;
    inputs->offset_R[row] = ZERO_POINT * i_total(sum);
}

typedef struct {
    const Matrix *matrix;
    const Inputs *inputs;
    int64_t rows;
    float *y_RV;
    int add; /* to what is in y */
    int64_t panels; /* of an item */
} Product;

/* One panel of outputs of `rows` (a constant where this is inlined) rows from `first` on. */
FAST INLINE void multiply_rows(const int rows, const Product *product, int64_t panel,
                               int64_t first) {
    const Matrix *matrix = product->matrix;
    const Inputs *inputs = product->inputs;
    const int64_t bytes = panel_bytes(matrix->inputs), stride = inputs->stride;
    const uint8_t *weights = matrix->packed + panel * bytes;
    const int8_t *x = inputs->bytes_RK + first * stride;
    Ints sums[MOST_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        sums[r][0] = sums[r][1] = i_all(0);
    for (int64_t at = 0; at < bytes; at += PANEL * GROUP, x += GROUP) {
        const Weights low = get_weights(weights + at);
        const Weights high = get_weights(weights + at + LANES * GROUP);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const Group group = get_group(x + r * stride);
            sums[r][0] = add_products(sums[r][0], low, group);
            sums[r][1] = add_products(sums[r][1], high, group);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const int64_t row = first + r, n = matrix->outputs;
        const Ints offset = i_all(inputs->offset_R[row]);
        const Floats largest = f_all(inputs->largest_R[row]);
        float *y = product->y_RV + row * n;
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const int64_t v = panel * PANEL + half * LANES;
            if (v >= n)
                break;
            Floats result = i_to_floats(i_sub(sums[r][half], offset));
            result = f_mul(f_mul(result, load(matrix->scale_V, v, n)), largest);
            store(y, v, n, product->add ? f_add(load(y, v, n), result) : result);
        }
    }
}

_Static_assert(MOST_ROWS == 2 || MOST_ROWS == 8, "a case below for each smaller number");

FAST static void multiply_panel(const Product *product, int64_t panel) {
    for (int64_t first = 0; first < product->rows; first += MOST_ROWS) {
        switch (product->rows - first) {
        case 1: multiply_rows(1, product, panel, first); break;
#if MOST_ROWS > 2
        case 2: multiply_rows(2, product, panel, first); break;
        case 3: multiply_rows(3, product, panel, first); break;
        case 4: multiply_rows(4, product, panel, first); break;
        case 5: multiply_rows(5, product, panel, first); break;
        case 6: multiply_rows(6, product, panel, first); break;
        case 7: multiply_rows(7, product, panel, first); break;
#endif
        default: multiply_rows(MOST_ROWS, product, panel, first);
        }
    }
}

static void multiply_item(void *about, int64_t item) {
    const Product *product = about;
    const int64_t panels = round_up(product->matrix->outputs, PANEL) / PANEL;
    const int64_t first = item * product->panels;
    for (int64_t i = first; i < first + product->panels && i < panels; i++)
        multiply_panel(product, i);
}

/* y = x Wᵀ, or y += x Wᵀ. */
static void multiply(const Matrix *matrix, const Inputs *inputs, int64_t rows, float *y_RV,
                     int add) {
    const int64_t panels = round_up(matrix->outputs, PANEL) / PANEL;
    int64_t each = PIECE_BYTES / panel_bytes(matrix->inputs);
    const int64_t fair = panels / (PIECES * (atomic_load(&pool.helpers) + 1));
    each = each < fair ? each : fair;
    each = each < 1 ? 1 : each;
    Product product = {matrix, inputs, rows, y_RV, add, each};
    share(multiply_item, &product, (panels + each - 1) / each);
}

#endif
