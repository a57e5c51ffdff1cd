/* One token step of the GPT on a CPU, its matrices in 8 bits, at the speed of the memory.

In: tensors of a GPT as mas/fast_decoder.py lays them out, tokens, the cache. Out: the state that
predicts the next token; or, for many rows, one product with a matrix. A step reads every weight
once, so nothing may come between two reads: one call does all of a step, and threads that are
awake share each piece of it (step_threads.h; what the pieces are made of: step_matrices.h,
step_attention.h, step_vectors.h). What the next token is, step_draw.h draws.

What is computed is what mas/decoder.py computes with mas/quantize.py: inputs of a matrix are
rounded to 8 bits row by row, sums are exact integers, all else is float32, keys and values are
bfloat16. No row depends on the others, and no number on how the work was shared: each output is
computed by one thread, in one order. Nor on the CPU: this file is compiled once for each kind of
instructions (step_avx512.c, …), whose header comes before and gives vectors of 16 lanes.

Callers check shapes and ranges; nothing here does, but for the tokens.
Axes: R rows, D width, N heads, H width of a head, T tokens, K inputs, V outputs. */

#include "step_attention.h"
#include "step_draw.h"
#include "step_matrices.h"
#include "step_threads.h"

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
