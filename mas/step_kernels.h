/* One token step of the GPT on a CPU, its matrices in 8 bits, at the speed of the memory.

In: tensors of a GPT as mas/fast_decoder.py lays them out, tokens, the cache. Out: the state that
predicts the next token; or, for many rows, one product with a matrix. A step reads every weight
once, so nothing may come between two reads: one call does all of a step, and threads that are
awake share each piece of it (step_threads.h; step_vectors.h: what is done to a few numbers).

What is computed is what mas/decoder.py computes with mas/quantize.py: inputs of a matrix are
rounded to 8 bits row by row, sums are exact integers, all else is float32, keys and values are
bfloat16. No row depends on the others, and no number on how the work was shared: each output is
computed by one thread, in one order. Nor on the CPU: this file is compiled once for each kind of
instructions (step_avx512.c, …), whose header comes before and gives vectors of 16 lanes.

Callers check shapes and ranges; nothing here does, but for the tokens.
Axes: R rows, D width, N heads, H width of a head, T tokens, K inputs, V outputs. */

#include <stdint.h>

#include "step_threads.h"
#include "step_vectors.h"

enum {
    GROUP = 4,                /* inputs that one instruction multiplies and adds */
    PANEL = 2 * LANES,        /* outputs that are computed together */
    PIECE_BYTES = 1 << 17,    /* of weights that a thread takes at a time, at most */
    PIECES = 4,               /* a thread, at least, where there are as many panels */
    LARGEST_INT8 = 127,       /* what the largest entry of a row becomes */
    CHUNK = 2 * LANES,        /* bfloat16 numbers of a vector */
    BLOCK = 512,              /* keys that attention reads before their values */
    MOST_HEAD_WIDTH = 256,    /* H */
};
#define SMALLEST 1e-30f /* instead of the largest entry of a row of zeros */

/* A matrix V K, packed by `step_pack`, and what an output of 1 stands for. */
typedef struct {
    const uint8_t *packed;
    const float *scale_V; /* step of the weights / LARGEST_INT8 */
    int64_t outputs, inputs;
} Matrix;

typedef struct {
    Norm attention_norm, q_norm, k_norm, feedforward_norm; /* no weight: no norm */
    Matrix to_qkv, to_out, expand, contract;
} Layer;

typedef struct {
    int64_t layers, width, heads, gated;
    const Layer *layer;
    Norm norm;
    const float *cosine_TH, *sine_TH; /* H/2 a token; NULL: no rotation */
} Model;

/* ---- Products with a matrix ---- */

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

/* ---- A step ---- */

typedef struct {
    const Model *model;
    const Layer *layer;
    int64_t rows, position, length; /* length: tokens that the cache has room for */
    uint16_t *pair;                 /* of this layer: keys and values, 2 R N T H in bfloat16 */
    float *x_RD;                    /* the residual stream */
    float *attended_RD;
    float *wide; /* q, k and v of each row, or its hidden layer */
    float *normed_RD;
    Inputs narrow, hidden; /* D or H inputs */
    const Norm *norm;      /* that comes next */
} Step;

static int64_t hidden_width(const Model *model) { return model->layer[0].contract.inputs; }

static int64_t wide_width(const Model *model) {
    const int64_t qkv = 3 * model->width, hidden = model->layer[0].expand.outputs;
    return qkv > hidden ? qkv : hidden;
}

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

/* Norms and turns query and key of one row and head, stores key and value, attends. */
FAST static void attend_item(void *about, int64_t item) {
    const Step *step = about;
    const Model *model = step->model;
    const int64_t width = model->width, heads = model->heads, head_width = width / heads;
    const int64_t row = item / heads, head = item % heads, position = step->position;
    float *q = step->wide + row * 3 * width + head * head_width, *k = q + width, *v = k + width;
    if (step->layer->q_norm.weight_D != NULL) {
        normalise(q, &step->layer->q_norm, head_width, q);
        normalise(k, &step->layer->k_norm, head_width, k);
    }
    if (model->cosine_TH != NULL) {
        const int64_t half = head_width / 2;
        turn(q, half, model->cosine_TH + position * half, model->sine_TH + position * half);
        turn(k, half, model->cosine_TH + position * half, model->sine_TH + position * half);
    }
    uint16_t *keys_TH = step->pair + item * step->length * head_width;
    uint16_t *values_TH = keys_TH + step->rows * width * step->length;
    put_bfloat16(k, head_width, keys_TH + position * head_width);
    put_bfloat16(v, head_width, values_TH + position * head_width);
    float *attended = step->attended_RD + row * width + head * head_width;
    if (head_width == 64) /* so that the compiler can unroll its loops */
        attend(q, keys_TH, values_TH, 64, position + 1, attended);
    else
        attend(q, keys_TH, values_TH, head_width, position + 1, attended);
}

/* Norm of the residual stream, rounded for the matrix behind it. */
static void norm_item(void *about, int64_t row) {
    const Step *step = about;
    const int64_t width = step->model->width;
    float *normed = step->normed_RD + row * width;
    normalise(step->x_RD + row * width, step->norm, width, normed);
    round_row(normed, width, &step->narrow, row);
}

static void attended_item(void *about, int64_t row) {
    const Step *step = about;
    const int64_t width = step->model->width;
    round_row(step->attended_RD + row * width, width, &step->narrow, row);
}

/* GELU, or SwiGLU of gates and the values behind them. */
FAST static void activate_item(void *about, int64_t row) {
    const Step *step = about;
    const int64_t n = hidden_width(step->model), gated = step->model->gated;
    float *x = step->wide + row * step->layer->expand.outputs;
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats entries = load(x, i, n);
        store(x, i, n, gated ? f_mul(silu(entries), load(x + n, i, n)) : gelu(entries));
    }
    round_row(x, n, &step->hidden, row);
}

static void read_layer(Step *step) {
    const Layer *layer = step->layer;
    const int64_t rows = step->rows;
    step->norm = &layer->attention_norm;
    share(norm_item, step, rows);
    multiply(&layer->to_qkv, &step->narrow, rows, step->wide, 0);
    share(attend_item, step, rows * step->model->heads);
    share(attended_item, step, rows);
    multiply(&layer->to_out, &step->narrow, rows, step->x_RD, 1);
    step->norm = &layer->feedforward_norm;
    share(norm_item, step, rows);
    multiply(&layer->expand, &step->narrow, rows, step->wide, 0);
    share(activate_item, step, rows);
    multiply(&layer->contract, &step->hidden, rows, step->x_RD, 1);
}

/* ---- What Python calls ---- */

typedef struct {
    const float *x_RK;
    const Inputs *inputs;
    int64_t width;
} Rounding;

static void round_item(void *about, int64_t row) {
    const Rounding *rounding = about;
    round_row(rounding->x_RK + row * rounding->width, rounding->width, rounding->inputs, row);
}

/* Bytes that a packed matrix takes. */
int64_t STEP(packed_bytes)(int64_t outputs, int64_t inputs) {
    return round_up(outputs, PANEL) / PANEL * panel_bytes(inputs);
}

/* Packs a matrix V K of int8 as V/32 K/4 32 4 with ZERO_POINT added, zeros where there is nothing.

`packed` begins at a whole vector. */
void STEP(pack)(const int8_t *weight_VK, int64_t outputs, int64_t inputs, uint8_t *packed) {
    for (int64_t panel = 0; panel < outputs; panel += PANEL) {
        for (int64_t k = 0; k < inputs; k += GROUP) {
            const int64_t count = inputs - k < GROUP ? inputs - k : GROUP;
            for (int64_t v = panel; v < panel + PANEL; v++, packed += GROUP) {
                for (int64_t i = 0; i < GROUP; i++)
                    packed[i] = ZERO_POINT;
                for (int64_t i = 0; v < outputs && i < count; i++)
                    packed[i] = (uint8_t)(weight_VK[v * inputs + k + i] + ZERO_POINT);
            }
        }
    }
}

/* Bytes that `step_multiply` needs beside. */
int64_t STEP(multiply_bytes)(int64_t rows, int64_t inputs) { return inputs_bytes(rows, inputs); }

/* y R V = x R K times the transposed matrix; `memory`: at a whole vector. */
void STEP(multiply)(const Matrix *matrix, const float *x_RK, int64_t rows, float *y_RV,
                    void *memory, int64_t threads) {
    const Inputs inputs = place_inputs(memory, rows, matrix->inputs);
    Rounding rounding = {x_RK, &inputs, matrix->inputs};
    open_pool(threads);
    share(round_item, &rounding, rows);
    multiply(matrix, &inputs, rows, y_RV, 0);
    close_pool();
}

/* Bytes that `step_read` needs beside. */
int64_t STEP(read_bytes)(const Model *model, int64_t rows) {
    const int64_t floats = rows * (3 * model->width + wide_width(model));
    return round_up(floats * 4, 64) + inputs_bytes(rows, model->width) +
           inputs_bytes(rows, hidden_width(model));
}

/* Reads one token a row at `position`, fills the cache there, leaves the last state in `state_RD`.

embedding_VD: bfloat16, of the stream of the position; vocabulary: its V. position_D: its vector.
pairs: one a layer, 2 R N T H in bfloat16, T = `length`. memory: at a whole vector. Returns -1 where
a token is not below the vocabulary, and has done nothing then. */
int STEP(read)(const Model *model, const int64_t *tokens_R, int64_t rows,
               const uint16_t *embedding_VD, int64_t vocabulary, const float *position_D,
               uint16_t *const *pairs, int64_t position, int64_t length, float *state_RD,
               void *memory, int64_t threads) {
    const int64_t width = model->width;
    for (int64_t r = 0; r < rows; r++)
        if (tokens_R[r] < 0 || tokens_R[r] >= vocabulary)
            return -1;
    Step step = {.model = model, .rows = rows, .position = position, .length = length};
    step.x_RD = memory;
    step.attended_RD = step.x_RD + rows * width;
    step.normed_RD = step.attended_RD + rows * width;
    step.wide = step.normed_RD + rows * width;
    int8_t *rest = (int8_t *)memory + round_up(rows * (3 * width + wide_width(model)) * 4, 64);
    step.narrow = place_inputs(rest, rows, width);
    step.hidden = place_inputs(rest + inputs_bytes(rows, width), rows, hidden_width(model));
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t d = 0; d < width; d++) {
            const uint32_t bits = (uint32_t)embedding_VD[tokens_R[r] * width + d] << 16;
            float entry;
            memcpy(&entry, &bits, sizeof entry);
            step.x_RD[r * width + d] = entry + position_D[d];
        }
    }
    open_pool(threads);
    for (int64_t i = 0; i < model->layers; i++) {
        step.layer = model->layer + i;
        step.pair = pairs[i];
        read_layer(&step);
    }
    close_pool();
    for (int64_t r = 0; r < rows; r++)
        normalise(step.x_RD + r * width, &model->norm, width, state_RD + r * width);
    return 0;
}
