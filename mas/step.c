/* One token step of the GPT on a CPU, its matrices in 8 bits, at the speed of the memory.

In: tensors of a GPT as mas/fast_decoder.py lays them out, tokens, the cache. Out: the state that
predicts the next token; or, for many rows, one product with a matrix. A step reads every weight
once, so nothing may come between two reads: one call does all of a step, and threads that are
awake share each piece of it.

What is computed is what mas/decoder.py computes with mas/quantize.py: inputs of a matrix are
rounded to 8 bits row by row, sums are exact integers, all else is float32, keys and values are
bfloat16. No row depends on the others, and no number on how the work was shared: each output is
computed by one thread, in one order.

Needs AVX-512 with VNNI, which `step_version` tells; elsewhere this file compiles to that answer.
Callers check shapes and ranges; nothing here does, but for the tokens.
Axes: R rows, D width, N heads, H width of a head, T tokens, K inputs, V outputs. */

#define _GNU_SOURCE
#include <stdint.h>

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__) && !defined(_WIN32)

#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define FAST __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define INLINE static inline __attribute__((always_inline))

enum {
    VERSION = 1,              /* of the calls below; mas/fast_decoder.py asks for the same */
    LANES = 16,               /* floats of a vector */
    GROUP = 4,                /* inputs that one instruction multiplies and adds */
    PANEL = 2 * LANES,        /* outputs that are computed together */
    MOST_ROWS = 8,            /* rows that are: with PANEL, what the registers hold */
    PIECE_BYTES = 1 << 17,    /* of weights that a thread takes at a time, at most */
    PIECES = 4,               /* a thread, at least, where there are as many panels */
    LARGEST_INT8 = 127,       /* what the largest entry of a row becomes */
    ZERO_POINT = 128,         /* the byte of a weight of 0 */
    CHUNK = 2 * LANES,        /* bfloat16 numbers of a vector */
    BLOCK = 512,              /* keys that attention reads before their values */
    MOST_HEAD_WIDTH = 256,    /* H */
    MOST_THREADS = 256,
    PAUSES = 2000,            /* that an idle thread spins before it lets others run, ~0.05 ms */
    YIELDS = 2000,            /* that it then goes on looking before it sleeps, ~1 ms */
};
#define LAYER_EPSILON 1e-5f
#define RMS_EPSILON 1.1920929e-7f /* of float32 */
#define SMALLEST 1e-30f           /* instead of the largest entry of a row of zeros */

/* A matrix V K, packed by `step_pack`, and what an output of 1 stands for. */
typedef struct {
    const uint8_t *packed;
    const float *scale_V; /* step of the weights / LARGEST_INT8 */
    int64_t outputs, inputs;
} Matrix;

/* LayerNorm, or RMSNorm where there is no bias. */
typedef struct {
    const float *weight_D, *bias_D;
} Norm;

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

/* ---- Threads that wait awake ---- */

typedef void Work(void *about, int64_t item);

/* The threads claim what is to do by counting `left` down. What is claimed is not over before
   `done` says so, so it does not matter whether a thread comes late, or not at all. */
static struct {
    _Alignas(64) _Atomic int64_t left; /* items nobody has claimed */
    _Alignas(64) _Atomic int64_t done;
    _Alignas(64) Work *work;
    void *about;
    int64_t items;
    _Alignas(64) _Atomic int helpers; /* threads that may take part beside the caller's */
    _Atomic int asleep; /* those that a call of `wake` reaches */
    int started;
    int watches_forks;
    pthread_mutex_t turn; /* one caller at a time */
    pthread_mutex_t sleep;
    pthread_cond_t wake, more; /* there is work; there are more helpers */
} pool = {.turn = PTHREAD_MUTEX_INITIALIZER,
          .sleep = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .more = PTHREAD_COND_INITIALIZER};

/* Does one item, if one is left. */
static int take_part(void) {
    int64_t left = atomic_load_explicit(&pool.left, memory_order_relaxed);
    while (left > 0) {
        if (atomic_compare_exchange_weak(&pool.left, &left, left - 1)) {
            pool.work(pool.about, pool.items - left);
            atomic_fetch_add_explicit(&pool.done, 1, memory_order_release);
            return 1;
        }
    }
    return 0;
}

static void sleep_until_needed(int index) {
    pthread_mutex_lock(&pool.sleep);
    while (index >= atomic_load(&pool.helpers))
        pthread_cond_wait(&pool.more, &pool.sleep);
    atomic_fetch_add(&pool.asleep, 1);
    while (atomic_load(&pool.left) <= 0 && index < atomic_load(&pool.helpers))
        pthread_cond_wait(&pool.wake, &pool.sleep);
    atomic_fetch_sub(&pool.asleep, 1);
    pthread_mutex_unlock(&pool.sleep);
}

static void *help(void *argument) {
    int index = (int)(intptr_t)argument;
    for (int idle = 0;; idle++) {
        if (index < atomic_load_explicit(&pool.helpers, memory_order_relaxed) && take_part())
            idle = 0;
        else if (idle < PAUSES)
            _mm_pause();
        else if (idle < PAUSES + YIELDS)
            sched_yield();
        else {
            sleep_until_needed(index);
            idle = 0;
        }
    }
    return NULL;
}

/* In a forked child, which has none of the threads. */
static void forget_threads(void) {
    pool.started = 0;
    atomic_store(&pool.left, 0);
    atomic_store(&pool.asleep, 0);
    pthread_mutex_init(&pool.turn, NULL);
    pthread_mutex_init(&pool.sleep, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.more, NULL);
}

/* Takes the pool for this caller, with as many threads as can be had. */
static void open_pool(int64_t threads) {
    pthread_mutex_lock(&pool.turn);
    if (!pool.watches_forks)
        pool.watches_forks = pthread_atfork(NULL, NULL, forget_threads) == 0;
    int helpers = (int)(threads > MOST_THREADS ? MOST_THREADS : threads) - 1;
    sigset_t all, before; /* signals are for the threads that expect them */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.started < helpers) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, (void *)(intptr_t)pool.started) != 0)
            break;
        pthread_detach(thread);
        pool.started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (helpers != atomic_load(&pool.helpers)) {
        pthread_mutex_lock(&pool.sleep);
        atomic_store(&pool.helpers, helpers);
        pthread_cond_broadcast(&pool.more);
        pthread_mutex_unlock(&pool.sleep);
    }
}

static void close_pool(void) { pthread_mutex_unlock(&pool.turn); }

/* Runs `work` for the items 0 … items - 1 on all threads of the open pool, and waits for it. */
static void share(Work *work, void *about, int64_t items) {
    if (pool.helpers <= 0 || items == 1) {
        for (int64_t item = 0; item < items; item++)
            work(about, item);
        return;
    }
    pool.work = work;
    pool.about = about;
    pool.items = items;
    atomic_store(&pool.done, 0);
    atomic_store(&pool.left, items);
    if (atomic_load(&pool.asleep) > 0) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep);
    }
    while (take_part())
        ;
    for (int waits = 0; atomic_load_explicit(&pool.done, memory_order_acquire) < items; waits++) {
        if (waits < PAUSES)
            _mm_pause();
        else
            sched_yield();
    }
}

/* ---- Vectors ---- */

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
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += LANES) {
        __m512i bits = _mm512_castps_si512(_mm512_abs_ps(load(x, i, n)));
        most = _mm512_max_epi32(most, bits);
    }
    union {
        int32_t bits;
        float value;
    } largest = {.bits = _mm512_reduce_max_epi32(most)};
    if (largest.value < SMALLEST)
        largest.value = SMALLEST;
    const __m512 factor = _mm512_set1_ps(LARGEST_INT8 / largest.value);
    int8_t *bytes = inputs->bytes_RK + row * inputs->stride;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < inputs->stride; i += LANES) {
        __m512i entry = _mm512_setzero_si512();
        if (i < n) {
            __m512 shifted = _mm512_mul_ps(load(x, i, n), factor);
            shifted = _mm512_add_ps(shifted, _mm512_set1_ps(128.5f));
            entry = _mm512_sub_epi32(_mm512_cvttps_epi32(shifted), _mm512_set1_epi32(128));
        }
        sum = _mm512_add_epi32(sum, entry);
        _mm_storeu_si128((__m128i *)(bytes + i), _mm512_cvtepi32_epi8(entry));
    }
    inputs->largest_R[row] = largest.value;
    inputs->offset_R[row] = ZERO_POINT * _mm512_reduce_add_epi32(sum);
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
    __m512i sums[MOST_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int64_t at = 0; at < bytes; at += 128, x += GROUP) {
        const __m512i low = _mm512_load_si512(weights + at);
        const __m512i high = _mm512_load_si512(weights + at + 64);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            int32_t group;
            memcpy(&group, x + r * stride, sizeof group);
            const __m512i entries = _mm512_set1_epi32(group);
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], low, entries);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], high, entries);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        const int64_t row = first + r, n = matrix->outputs;
        const __m512i offset = _mm512_set1_epi32(inputs->offset_R[row]);
        const __m512 largest = _mm512_set1_ps(inputs->largest_R[row]);
        float *y = product->y_RV + row * n;
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const int64_t v = panel * PANEL + half * LANES;
            if (v >= n)
                break;
            __m512 result = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][half], offset));
            result = _mm512_mul_ps(result, load(matrix->scale_V, v, n));
            result = _mm512_mul_ps(result, largest);
            store(y, v, n, product->add ? _mm512_add_ps(load(y, v, n), result) : result);
        }
    }
}

FAST static void multiply_panel(const Product *product, int64_t panel) {
    for (int64_t first = 0; first < product->rows; first += MOST_ROWS) {
        switch (product->rows - first) {
        case 1: multiply_rows(1, product, panel, first); break;
        case 2: multiply_rows(2, product, panel, first); break;
        case 3: multiply_rows(3, product, panel, first); break;
        case 4: multiply_rows(4, product, panel, first); break;
        case 5: multiply_rows(5, product, panel, first); break;
        case 6: multiply_rows(6, product, panel, first); break;
        case 7: multiply_rows(7, product, panel, first); break;
        default: multiply_rows(8, product, panel, first);
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
static void multiply(const Matrix *matrix, const Inputs *inputs, int64_t rows, float *y_RV, int add) {
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

/* 32 bfloat16 numbers at `i`, zeros from `n` on: those at even places, and those at odd ones. */
FAST INLINE void get_chunk(const uint16_t *x, int64_t i, int64_t n, __m512 *even, __m512 *odd) {
    const __mmask32 mask = n - i >= CHUNK ? 0xffffffffu : n > i ? (1u << (n - i)) - 1 : 0;
    const __m512i bits = _mm512_maskz_loadu_epi16(mask, x + i);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)));
}

/* Where entry `h` of a head goes when each chunk's even entries come before its odd ones. */
INLINE int64_t sorted(int64_t h) { return h / CHUNK * CHUNK + h % 2 * LANES + h % CHUNK / 2; }

/* q · keys of 16 tokens, of which the first `count` are there; -inf for the others. */
FAST INLINE __m512 score(const float *q, const uint16_t *keys_TH, int64_t head_width,
                         int64_t count) {
    __m512 parts[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        const uint16_t *key = keys_TH + (i < count ? i * head_width : 0);
        parts[i] = _mm512_setzero_ps();
        for (int64_t h = 0; h < head_width; h += CHUNK) {
            __m512 even, odd;
            get_chunk(key, h, head_width, &even, &odd);
            parts[i] = _mm512_fmadd_ps(even, _mm512_loadu_ps(q + h), parts[i]);
            parts[i] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(q + h + LANES), parts[i]);
        }
    }
    const __mmask16 absent = (__mmask16)~lanes(0, count);
    return _mm512_mask_mov_ps(sum_each(parts), absent, _mm512_set1_ps(-INFINITY));
}

/* sums = sums * factor + weights · values of `count` tokens. */
FAST INLINE void add_values(float *sums, float factor, const float *weights,
                            const uint16_t *values_TH, int64_t head_width, int64_t count) {
    for (int64_t h = 0; h < head_width; h += 2 * CHUNK) {
        __m512 sum[2][4]; /* of every other token: a sum waits for the one before it */
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m512 before = _mm512_loadu_ps(sums + h + i * LANES);
            sum[0][i] = _mm512_mul_ps(before, _mm512_set1_ps(factor));
            sum[1][i] = _mm512_setzero_ps();
        }
        for (int64_t t = 0; t < count; t += 2) {
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const int64_t token = t + i < count ? t + i : t;
                const __m512 weight = _mm512_set1_ps(weights[t + i]);
                __m512 entries[4];
                get_chunk(values_TH + token * head_width, h, head_width, entries, entries + 1);
                get_chunk(values_TH + token * head_width, h + CHUNK, head_width, entries + 2,
                          entries + 3);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    sum[i][j] = _mm512_fmadd_ps(entries[j], weight, sum[i][j]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            _mm512_storeu_ps(sums + h + i * LANES, _mm512_add_ps(sum[0][i], sum[1][i]));
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
    __m512 total = _mm512_setzero_ps();
    float largest = -INFINITY;
    for (int64_t first = 0; first < tokens; first += BLOCK) {
        const int64_t count = tokens - first < BLOCK ? tokens - first : BLOCK;
        __m512 most = _mm512_set1_ps(largest);
        for (int64_t t = 0; t < count; t += LANES) {
            const uint16_t *keys = keys_TH + (first + t) * head_width;
            const __m512 scores = score(q, keys, head_width, count - t);
            _mm512_storeu_ps(weights + t, scores);
            most = _mm512_max_ps(most, scores);
        }
        const float before = largest;
        largest = _mm512_reduce_max_ps(most);
        const __m512 factor = exponential(_mm512_set1_ps(before - largest));
        total = _mm512_mul_ps(total, factor);
        for (int64_t t = 0; t < count; t += LANES) {
            const __m512 away = _mm512_sub_ps(_mm512_loadu_ps(weights + t), _mm512_set1_ps(largest));
            const __m512 weight = exponential(away);
            _mm512_storeu_ps(weights + t, weight);
            total = _mm512_add_ps(total, weight);
        }
        add_values(sums, _mm512_cvtss_f32(factor), weights, values_TH + first * head_width,
                   head_width, count);
    }
    const float share = 1.0f / _mm512_reduce_add_ps(total);
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
        __m512 entries = load(x, i, n);
        entries = gated ? _mm512_mul_ps(silu(entries), load(x + n, i, n)) : gelu(entries);
        store(x, i, n, entries);
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

/* Which version of these calls this is, 0 where the CPU cannot run them. */
int step_version(void) {
    const int able = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512vnni");
    return able ? VERSION : 0;
}

/* Bytes that a packed matrix takes. */
int64_t step_packed_bytes(int64_t outputs, int64_t inputs) {
    return round_up(outputs, PANEL) / PANEL * panel_bytes(inputs);
}

/* Packs a matrix V K of int8 as V/32 K/4 32 4 with 128 added, zeros where there is nothing.

`packed` begins at a whole vector. */
void step_pack(const int8_t *weight_VK, int64_t outputs, int64_t inputs, uint8_t *packed) {
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
int64_t step_multiply_bytes(int64_t rows, int64_t inputs) { return inputs_bytes(rows, inputs); }

/* y R V = x R K times the transposed matrix; `memory`: at a whole vector. */
void step_multiply(const Matrix *matrix, const float *x_RK, int64_t rows, float *y_RV, void *memory,
                   int64_t threads) {
    const Inputs inputs = place_inputs(memory, rows, matrix->inputs);
    Rounding rounding = {x_RK, &inputs, matrix->inputs};
    open_pool(threads);
    share(round_item, &rounding, rows);
    multiply(matrix, &inputs, rows, y_RV, 0);
    close_pool();
}

/* Bytes that `step_read` needs beside. */
int64_t step_read_bytes(const Model *model, int64_t rows) {
    const int64_t floats = rows * (3 * model->width + wide_width(model));
    return round_up(floats * 4, 64) + inputs_bytes(rows, model->width) +
           inputs_bytes(rows, hidden_width(model));
}

/* Reads one token a row at `position`, fills the cache there, leaves the last state in `state_RD`.

embedding_VD: bfloat16, of the stream of the position; vocabulary: its V. position_D: its vector.
pairs: one a layer, 2 R N T H in bfloat16, T = `length`. memory: at a whole vector. Returns -1 where
a token is not below the vocabulary, and has done nothing then. */
int step_read(const Model *model, const int64_t *tokens_R, int64_t rows,
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

#else

int step_version(void) { return 0; }

#endif
