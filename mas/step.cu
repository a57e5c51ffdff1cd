/* A whole one-token step of the GPT on a GPU, as one kernel that stays.
 *
 * In: a token a row, the matrices of all blocks, the cache of keys and values. Out: the state that
 * predicts the next token. mas/cuda_step.py compiles this file for one network and one number of
 * rows, whose sizes it defines (LAYERS ROWS D F HEADS H LENGTH PROGRAMS GATED QK_NORM ROTARY
 * NORM_EPSILON QK_EPSILON SHARED_LIMIT COPY_ENGINE), and launches one program of 512 threads a
 * multiprocessor.
 *
 * All programs go through all stages of all blocks. Their parts of the matrices stream into shared
 * memory, up to a whole block ahead of what is computed, whatever a stage waits for: memory never
 * rests. Numbers for other programs go to places that hold EMPTY until then; who needs one loads it
 * until it is another: no fence, no flag, and no barrier between programs. Products are left to the
 * tensor cores, where up to eight rows cost what one costs and the sum over K needs no exchange
 * between threads. Weights, and numbers on their way into a product, are bfloat16, everything else
 * float32.
 * After "Look Ma, No Bubbles!" (Hazy Research, 2025).
 *
 * Axes: R rows, N and K numbers out of and into a matrix, D width, F width of the feedforward,
 * H width of a head.
 */

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS 512
#define WARPS 16
#define CHUNK 32 /* numbers of a row of a matrix that four threads load at once */
#define PAD 32   /* numbers between rows of the state, against bank conflicts */
#define EMPTY 0xffffffffu /* not a number, and not the one that arithmetic gives */

#define NOTHING __uint_as_float(0xff800000u) /* minus infinity */
#define CEIL(a, b) (((a) + (b) - 1) / (b))

constexpr int TASKS = ROWS * HEADS;
__device__ constexpr int power_below(int x) { return x < 2 ? 1 : 2 * power_below(x / 2); }
__device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
/* Programs that share a head: each sums up some columns of its values, 8 or more. */
constexpr int SHARES = power_below(larger(1, smaller(PROGRAMS / TASKS, H / 8)));
constexpr int COLUMNS = H / SHARES;
constexpr int WIDEST = larger(D, F);
constexpr int SHARE_QKV = CEIL(3 * D, PROGRAMS);
constexpr int SHARE_D = CEIL(D, PROGRAMS);
constexpr int SHARE_F = 2 * CEIL(F, 2 * PROGRAMS); /* whole pairs */

/* The tensors of a block; what it does not have is null. */
struct Block {
  const u16 *attention_norm, *attention_bias, *to_qkv, *q_norm, *k_norm, *to_out;
  const u16 *feedforward_norm, *feedforward_bias, *expand, *contract;
  u16 *cache; /* 2 R HEADS LENGTH H */
};

#ifndef EMULATED
#include "step_device.cuh"
#endif

__device__ inline float low_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_of(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ inline float to_float(u16 x) { return __uint_as_float((u32)x << 16); }

__device__ inline void unpack(uint4 eight, float x[8]) {
  const u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = low_of(pairs[i]);
    x[2 * i + 1] = high_of(pairs[i]);
  }
}

/* The sum over `width` neighbouring threads, from `step` on, in all of them. */
__device__ inline float sum_over(float x, int step, int width) {
  for (int i = step; i < width; i *= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}

/* Waits for `count` times four words that other programs give in this launch, at where(0) … */
template <int COUNT, class Where>
__device__ inline void take(Where where, int count, u32 (&bits)[4 * COUNT]) {
  for (;;) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (i < count) {
        load_relaxed(where(i), bits + 4 * i);
#pragma unroll
        for (int j = 0; j < 4; j++) all = all && bits[4 * i + j] != EMPTY;
      }
    if (all) return;
    pause();
  }
}

#include "step_matrices.cuh"

constexpr int ROW_THREADS = THREADS / power_below(2 * ROWS - 1);
constexpr int FOURS = CEIL(D / 4, ROW_THREADS);

/* RMSNorm or LayerNorm of R rows of D numbers, as bfloat16; rows of the result have D + PAD. */
__device__ void normalise(const u32 *x, const u16 *weights, u16 *result, float *sums) {
  const int thread = this_thread(), r = thread / ROW_THREADS, i0 = thread % ROW_THREADS;
  const int count = r < ROWS ? CEIL(larger(0, D / 4 - i0), ROW_THREADS) : 0;
  u32 bits[4 * FOURS] = {};
  take<FOURS>([&](int i) { return x + r * D + 4 * (i0 + i * ROW_THREADS); }, count, bits);
  float v[FOURS][4], total = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < FOURS; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      v[i][j] = __uint_as_float(bits[4 * i + j]);
      total += v[i][j];
      squares += v[i][j] * v[i][j];
    }
  total = sum_over(total, 1, 32);
  squares = sum_over(squares, 1, 32);
  const int warp = thread / 32, first = warp / (ROW_THREADS / 32) * (ROW_THREADS / 32);
  if (thread % 32 == 0) {
    sums[2 * warp] = total;
    sums[2 * warp + 1] = squares;
  }
  __syncthreads();
  total = squares = 0;
#pragma unroll
  for (int i = 0; i < ROW_THREADS / 32; i++) {
    total += sums[2 * (first + i)];
    squares += sums[2 * (first + i) + 1];
  }
  const float mean = GATED ? 0.0f : total / D;
  const float scale = rsqrtf(fmaxf(squares / D - mean * mean, 0.0f) + NORM_EPSILON);
#pragma unroll
  for (int i = 0; i < FOURS; i++) {
    const int d = 4 * (i0 + i * ROW_THREADS);
    if (i >= count) continue;
    const uint2 weight = *(const uint2 *)(weights + d);
    uint2 bias = {0, 0}, four;
    if (!GATED) bias = *(const uint2 *)(weights + D + d);
    four.x = round_pair((v[i][0] - mean) * scale * low_of(weight.x) + low_of(bias.x),
                        (v[i][1] - mean) * scale * high_of(weight.x) + high_of(bias.x));
    four.y = round_pair((v[i][2] - mean) * scale * low_of(weight.y) + low_of(bias.y),
                        (v[i][3] - mean) * scale * high_of(weight.y) + high_of(bias.y));
    *(uint2 *)(result + r * (D + PAD) + d) = four;
  }
}

/* R rows of K bfloat16 numbers, given in pairs; rows of the result have K + PAD. */
template <int K> __device__ void copy_rows(const u32 *x, u16 *result) {
  constexpr int EIGHTS = ROWS * K / 8, COUNT = smaller(4, CEIL(EIGHTS, THREADS));
#pragma unroll 1
  for (int first = this_thread(); first < EIGHTS; first += COUNT * THREADS) {
    const int count = CEIL(EIGHTS - first, THREADS);
    u32 bits[4 * COUNT];
    take<COUNT>([&](int i) { return x + 4 * (first + i * THREADS); }, count, bits);
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
      const int i = 8 * (first + j * THREADS);
      if (j < count)
        *(uint4 *)(result + i / K * (K + PAD) + i % K) = {bits[4 * j], bits[4 * j + 1],
                                                          bits[4 * j + 2], bits[4 * j + 3]};
    }
  }
}

#include "step_attention.cuh"

__device__ inline float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678118654752f)); }
__device__ inline float silu(float x) { return x / (1 + fast_exp(-x)); }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
read_token(const Block *all_blocks, const long long *tokens, long long *place,
           const u16 *embedding, const u16 *positions, const u16 *cosine, const u16 *sine,
           const u16 *norm_weight, const u16 *norm_bias, u32 *scratch, u16 *state, u32 *counts) {
  SHARED(memory);
  Stream stream;
  stream.slots = memory;
  u16 *x = (u16 *)(memory + SLOTS * SLOT);
  float *sums = (float *)((unsigned char *)x + X_BYTES), *more_sums = sums + SUMS;
  float *attention_sums = (float *)((unsigned char *)sums + SUMS_BYTES);
  float *norm_sums = (float *)((unsigned char *)attention_sums + ATTENTION_BYTES);
  stream.norms = (u16 *)((unsigned char *)norm_sums + NORM_SUM_BYTES);
  stream.more_norms = stream.norms + NORM + QK_NORMS;
  stream.last_weight = norm_weight;
  stream.last_bias = norm_bias;
  stream.barriers = (u64 *)((unsigned char *)stream.norms + NORMS_BYTES);
  u32 *launch = (u32 *)(stream.barriers + ITEMS);
  Block *blocks = (Block *)((unsigned char *)stream.barriers + BARRIER_BYTES);
  stream.blocks = blocks;
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) start_barrier(stream.barriers + i, COPY_ENGINE ? 1 : THREADS);
    show_barriers();
    *launch = count_up(counts) / PROGRAMS;
  }
  for (int i = threadIdx.x; i < BLOCKS_BYTES / 8; i += THREADS)
    ((u64 *)blocks)[i] = ((const u64 *)all_blocks)[i];
  __syncthreads();
  for (int item = 0; item < SLOTS; item++) stream.request(item);
  const int position = (int)*place;
  u32 *next = scratch + (*launch + 1) % 2 * SCRATCH_WORDS;
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < SCRATCH_WORDS / 4; i += PROGRAMS * THREADS)
    ((uint4 *)next)[i] = {EMPTY, EMPTY, EMPTY, EMPTY};
  u32 *states = scratch + *launch % 2 * SCRATCH_WORDS;
  Attention attention;
  attention.place();
  /* One number of the state stays with the thread that adds to it. */
  static_assert(SHARE_D * ROWS <= THREADS, "rows");
  const int own_row = threadIdx.x % SHARE_D, own_r = threadIdx.x / SHARE_D;
  const int own_d = blockIdx.x * SHARE_D + own_row;
  const bool owner = own_r < ROWS && own_d < D;
  float own = 0;
  if (owner) {
    own = to_float(embedding[(u64)tokens[own_r] * D + own_d]) +
          to_float(positions[(u64)position * D + own_d]);
    give(states + own_r * D + own_d, __float_as_uint(own));
  }
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    const Block &block = blocks[layer];
    u32 *between = states + STATE_WORDS, *qkv = between + STATE_WORDS, *attended = qkv + QKV_WORDS;
    u32 *hidden = attended + ATTENDED_WORDS, *after = hidden + HIDDEN_WORDS;
    int item = ITEMS * layer;
    stream.wait(item);
    normalise(states, stream.norms, x, norm_sums);
    __syncthreads();
    QKVTile::multiply_by(stream.slot(item), x, sums);
    __syncthreads();
    for (int i = this_thread(); i < SHARE_QKV * ROWS; i += THREADS) {
      const int row = i % SHARE_QKV, r = i / SHARE_QKV, n = blockIdx.x * SHARE_QKV + row;
      if (n < 3 * D)
        give(qkv + r * 3 * D + n, __float_as_uint(QKVTile::total(sums, row, r)));
    }
    attention.load(block.cache, position);
    attention.attend(block, qkv, attended, position, stream.norms + NORM, cosine, sine,
                     attention_sums);

    copy_rows<D>(attended, x);
    __syncthreads();
    OutTile::multiply_by(stream.slot(item) + QKVTile::BYTES, x, sums);
    __syncthreads();
    if (owner) {
      own += OutTile::total(sums, own_row, own_r);
      give(between + own_r * D + own_d, __float_as_uint(own));
    }
    stream.request(item + SLOTS);
    item++;

    stream.wait(item);
    normalise(between, stream.more_norms, x, norm_sums);
    __syncthreads();
    ExpandTile::multiply_by(stream.slot(item), x, sums);
    if (GATED) ExpandTile::multiply_by(stream.slot(item) + ExpandTile::BYTES, x, more_sums);
    __syncthreads();
    for (int i = this_thread(); i < SHARE_F / 2 * ROWS; i += THREADS) {
      const int row = i % (SHARE_F / 2) * 2, r = i / (SHARE_F / 2);
      const int n = blockIdx.x * SHARE_F + row;
      float y[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        y[j] = ExpandTile::total(sums, row + j, r);
        y[j] = GATED ? silu(y[j]) * ExpandTile::total(more_sums, row + j, r) : gelu(y[j]);
      }
      if (n < F) give(hidden + (r * F + n) / 2, round_pair(y[0], y[1]));
    }
    stream.request(item + SLOTS);
    item++;

    copy_rows<F>(hidden, x);
    stream.wait(item);
    __syncthreads();
    ContractTile::multiply_by(stream.slot(item), x, sums);
    __syncthreads();
    if (owner) {
      own += ContractTile::total(sums, own_row, own_r);
      give(after + own_r * D + own_d, __float_as_uint(own));
    }
    stream.request(item + SLOTS);
    states = after;
  }
  if (blockIdx.x == 0) {
    stream.wait(LAST);
    normalise(states, stream.norms, x, norm_sums);
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * D; i += THREADS) state[i] = x[i / D * (D + PAD) + i % D];
  }
  if (threadIdx.x == 0 && count_up(counts + 1) % PROGRAMS == PROGRAMS - 1) ++*place; /* all read it */
}
