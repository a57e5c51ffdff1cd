/* A whole one-token step of the GPT on a GPU, as one kernel that stays.
 *
 * In: a token a row, the matrices of all blocks, the cache of keys and values. Out: the state that
 * predicts the next token. mas/cuda_step.py compiles this file for one network and one number of
 * rows, whose sizes it defines (LAYERS ROWS D F HEADS H LENGTH PROGRAMS GATED QK_NORM ROTARY
 * NORM_EPSILON QK_EPSILON), and launches one program of 512 threads a multiprocessor.
 *
 * All programs go through all stages of all blocks; between two stages they wait for each other at
 * a counter. The matrix of the next stage is in registers by then and those behind it are on their
 * way into the L2 cache, so the memory is read without a pause, which kernels of one matrix each
 * cannot do: every one of them begins with an empty pipe. Products are left to the tensor cores,
 * where up to eight rows cost what one costs and the sum over K needs no exchange between threads.
 * Weights, and numbers on their way into a product, are bfloat16, everything else float32.
 * The idea: "Look Ma, No Bubbles!" (Hazy Research, 2025).
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
#define PAD 32   /* numbers between rows in shared memory, against bank conflicts */

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
constexpr int SHARE_F = CEIL(F, PROGRAMS);

/* The tensors of a block; what it does not have is null. */
struct Block {
  const u16 *attention_norm, *attention_bias, *to_qkv, *q_norm, *k_norm, *to_out;
  const u16 *feedforward_norm, *feedforward_bias, *expand, *contract;
  u16 *cache; /* 2 R HEADS LENGTH H */
};

#ifndef EMULATED /* tests/mas/step_emulator.h has the same for a CPU */

#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]

/* Two numbers as bfloat16, the first in the lower half. */
__device__ inline u32 round_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline float fast_exp(float x) { return __expf(x); }

/* The number of this thread. What follows from it is computed where it is needed: kept from one
 * block of the network to the next, it would take registers from the weights. */
__device__ inline int this_thread() {
  int i;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
  return i;
}

/* sums += a b for 16 rows of a matrix, 16 numbers each, and 8 columns. */
__device__ inline void multiply(float sums[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* What does not change while the kernel runs. */
__device__ inline uint4 load_constant(const void *address) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(address));
  return x;
}

/* What other programs have just written. */
__device__ inline uint4 load_new(const void *address) {
  uint4 x;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(address)
               : "memory");
  return x;
}

__device__ inline float load_new_number(const float *address) {
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(address) : "memory");
  return x;
}

__device__ inline void count_up(u32 *counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ inline void wait_for(u32 *counter, u32 count) {
  u32 seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < count);
}

/* Sends memory on its way into the L2 cache; both a multiple of 16. */
__device__ inline void fetch(const void *address, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
#endif
}

#endif

__device__ inline float low_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_of(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ inline float to_float(u16 x) { return __uint_as_float((u32)x << 16); }

__device__ inline u16 to_bfloat16(float x) { return (u16)round_pair(x, 0.0f); }

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

__device__ inline void arrive(u32 *counter) {
  __syncthreads();
  if (threadIdx.x == 0) count_up(counter);
}

__device__ inline void wait(u32 *counter, u32 programs) {
  if (threadIdx.x == 0) wait_for(counter, programs * PROGRAMS);
  __syncthreads();
}

/* The rows of a matrix that belong to this program, in registers, spread so that a thread holds
 * what the tensor cores want of it. Groups of 16 rows x CHUNK go round the warps. */
template <int N, int K, int SHARE> struct Tile {
  static constexpr int GROUPS = power_below(2 * CEIL(SHARE, 16) - 1); /* of 16 rows, 1 2 4 … */
  static constexpr int SPLITS = WARPS / GROUPS;                       /* of K */
  static constexpr int STEPS = CEIL(K / CHUNK, SPLITS);
  static constexpr int HALVES = SHARE > 8 ? 2 : 1; /* of 16 rows */
  static_assert(GROUPS <= WARPS && K % CHUNK == 0, "sizes");
  uint4 weights[STEPS * HALVES];

  __device__ void load(const u16 *matrix) {
    const int thread = this_thread(), warp = thread / 32, lane = thread % 32;
    const int group = warp % GROUPS, split = warp / GROUPS;
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
      for (int half = 0; half < HALVES; half++) {
        const int row = group * 16 + half * 8 + lane / 4, n = blockIdx.x * SHARE + row;
        const int chunk = split * STEPS + step;
        uint4 eight = {0, 0, 0, 0};
        if (row < SHARE && n < N && chunk < K / CHUNK)
          eight = load_constant(matrix + (u64)n * K + chunk * CHUNK + lane % 4 * 8);
        weights[step * HALVES + half] = eight;
      }
  }

  /* Into sums[(split * GROUPS * 16 + row) * ROWS + r]; x is bfloat16, R rows of K + PAD. */
  __device__ void multiply_by(const u16 *x, float *sums) const {
    const int thread = this_thread(), warp = thread / 32, lane = thread % 32;
    const int group = warp % GROUPS, split = warp / GROUPS, r = lane / 4;
    float c[4] = {0, 0, 0, 0};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const int chunk = split * STEPS + step;
      uint4 b = {0, 0, 0, 0};
      if (r < ROWS && chunk < K / CHUNK)
        b = *(const uint4 *)(x + r * (K + PAD) + chunk * CHUNK + lane % 4 * 8);
      const uint4 low = weights[step * HALVES];
      uint4 high = {0, 0, 0, 0};
      if (HALVES == 2) high = weights[step * HALVES + HALVES - 1];
      multiply(c, low.x, high.x, low.y, high.y, b.x, b.y);
      multiply(c, low.z, high.z, low.w, high.w, b.z, b.w);
    }
#pragma unroll
    for (int i = 0; i < 2 * HALVES; i++) {
      const int row = group * 16 + i / 2 * 8 + lane / 4, column = lane % 4 * 2 + i % 2;
      if (column < ROWS) sums[(split * GROUPS * 16 + row) * ROWS + column] = c[i];
    }
  }

  /* The sum over all splits of what `multiply_by` wrote. */
  __device__ static float total(const float *sums, int row, int r) {
    float x = 0;
#pragma unroll
    for (int split = 0; split < SPLITS; split++)
      x += sums[(split * GROUPS * 16 + row) * ROWS + r];
    return x;
  }

  __device__ static void fetch_rows(const u16 *matrix) {
    const int first = blockIdx.x * SHARE;
    if (threadIdx.x == 0 && first < N)
      fetch(matrix + (u64)first * K, smaller(SHARE, N - first) * K * 2);
  }
};

typedef Tile<3 * D, D, SHARE_QKV> QKVTile;
typedef Tile<D, D, SHARE_D> OutTile;
typedef Tile<F, D, SHARE_F> ExpandTile;
typedef Tile<D, F, SHARE_D> ContractTile;

/* Numbers of shared memory. */
constexpr int SUMS = ROWS * WARPS * 16 * (GATED ? 2 : 1);
constexpr int X_BYTES = ROWS * (WIDEST + PAD) * 2;
constexpr int KEY_LANES = H / 8, KEYS_AT_ONCE = 32 / KEY_LANES;
constexpr int KEY_STEPS = CEIL(LENGTH, WARPS * KEYS_AT_ONCE);
constexpr int VALUE_LANES = COLUMNS / 8, VALUES_AT_ONCE = 32 / VALUE_LANES;
constexpr int VALUE_STEPS = CEIL(KEY_STEPS * KEYS_AT_ONCE, VALUES_AT_ONCE);
constexpr int SHARED_FLOATS =
    larger(SUMS, WARPS * (VALUE_STEPS * VALUES_AT_ONCE + COLUMNS + 2) + 1) + 2 * WARPS;
constexpr int SHARED_BYTES = X_BYTES + SHARED_FLOATS * 4;
extern "C" {
__device__ int shared_bytes = SHARED_BYTES; /* for who launches the kernel */
}

constexpr int ROW_THREADS = THREADS / power_below(2 * ROWS - 1);
constexpr int FOURS = CEIL(D / 4, ROW_THREADS);

/* Weight and bias of a norm for the numbers of a row that are this thread's. */
struct Norm {
  uint2 weight[FOURS], bias[FOURS];

  __device__ void load(const u16 *weights, const u16 *biases) {
    const int first = 4 * (this_thread() % ROW_THREADS);
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
      const int d = first + 4 * i * ROW_THREADS;
      weight[i] = bias[i] = {0, 0};
      if (d < D) {
        weight[i] = *(const uint2 *)(weights + d);
        if (!GATED) bias[i] = *(const uint2 *)(biases + d);
      }
    }
  }

  /* RMSNorm or LayerNorm of R rows of D numbers, as bfloat16; rows of the result have D + PAD. */
  __device__ void apply(const float *x, u16 *result, float *sums) const {
    const int thread = this_thread(), r = thread / ROW_THREADS, i0 = thread % ROW_THREADS;
    float v[FOURS][4], total = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
      const int d = 4 * (i0 + i * ROW_THREADS);
      uint4 four = {0, 0, 0, 0};
      if (r < ROWS && d < D) four = load_new(x + r * D + d);
      v[i][0] = __uint_as_float(four.x);
      v[i][1] = __uint_as_float(four.y);
      v[i][2] = __uint_as_float(four.z);
      v[i][3] = __uint_as_float(four.w);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        total += v[i][j];
        squares += v[i][j] * v[i][j];
      }
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
    const float scale = rsqrtf(squares / D - mean * mean + NORM_EPSILON);
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
      const int d = 4 * (i0 + i * ROW_THREADS);
      if (r >= ROWS || d >= D) continue;
      uint2 four;
      four.x = round_pair((v[i][0] - mean) * scale * low_of(weight[i].x) + low_of(bias[i].x),
                          (v[i][1] - mean) * scale * high_of(weight[i].x) + high_of(bias[i].x));
      four.y = round_pair((v[i][2] - mean) * scale * low_of(weight[i].y) + low_of(bias[i].y),
                          (v[i][3] - mean) * scale * high_of(weight[i].y) + high_of(bias[i].y));
      *(uint2 *)(result + r * (D + PAD) + d) = four;
    }
  }
};

/* R rows of K bfloat16 numbers; rows of the result have K + PAD. */
template <int K> __device__ void copy_rows(const u16 *x, u16 *result) {
  constexpr int EIGHTS = K / 8;
  for (int i = this_thread(); i < ROWS * EIGHTS; i += THREADS)
    *(uint4 *)(result + i / EIGHTS * (K + PAD) + i % EIGHTS * 8) = load_new(x + (u64)i * 8);
}

/* Eight numbers of a query or key, normed and rotated as the network wants it. */
__device__ void prepare(float x[8], const u16 *norm, const u16 *cosine, const u16 *sine) {
  const int lane = threadIdx.x % KEY_LANES, half = KEY_LANES / 2;
  if (QK_NORM) {
    float squares = 0, weight[8];
    for (int i = 0; i < 8; i++) squares += x[i] * x[i];
    const float scale = rsqrtf(sum_over(squares, 1, KEY_LANES) / H + QK_EPSILON);
    unpack(load_constant(norm + lane * 8), weight);
    for (int i = 0; i < 8; i++) x[i] *= scale * weight[i];
  }
  if (ROTARY) { /* pairs are half a head apart */
    float c[8], s[8];
    unpack(load_constant(cosine + lane % half * 8), c);
    unpack(load_constant(sine + lane % half * 8), s);
    for (int i = 0; i < 8; i++) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], half);
      x[i] = x[i] * c[i] + (lane < half ? -other : other) * s[i];
    }
  }
}

/* Stores keys and values of a token and lets it see all up to it. One program takes one head of one
 * row and some columns of its values; one too many repeats the last work. */
struct Attention {
  uint4 keys[KEY_STEPS], values[VALUE_STEPS];
  int pair, share;

  __device__ void place() {
    const int task = smaller(blockIdx.x, TASKS * SHARES - 1);
    pair = task / SHARES; /* a head of a row */
    share = task % SHARES;
  }

  __device__ u16 *key(u16 *cache, int t) const { return cache + ((u64)pair * LENGTH + t) * H; }
  __device__ u16 *value(u16 *cache, int t) const { return key(cache, t) + (u64)TASKS * LENGTH * H; }

  __device__ void load(u16 *cache, int position) {
    const int thread = this_thread(), warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int step = 0; step < KEY_STEPS; step++) {
      const int t = (step * WARPS + warp) * KEYS_AT_ONCE + lane / KEY_LANES;
      keys[step] = {0, 0, 0, 0};
      if (t < position) keys[step] = load_constant(key(cache, t) + lane % KEY_LANES * 8);
    }
#pragma unroll
    for (int step = 0; step < VALUE_STEPS; step++) {
      /* The same keys as above, in the same order. */
      const int i = step * VALUES_AT_ONCE + lane / VALUE_LANES;
      const int t = (i / KEYS_AT_ONCE * WARPS + warp) * KEYS_AT_ONCE + i % KEYS_AT_ONCE;
      values[step] = {0, 0, 0, 0};
      if (t < position)
        values[step] =
            load_constant(value(cache, t) + share * COLUMNS + lane % VALUE_LANES * 8);
    }
  }

  __device__ void fetch_cache(u16 *cache, int position) const {
    const int part = CEIL(position, SHARES), first = share * part;
    const int count = smaller(part, position - first);
    if (threadIdx.x != 0 || count <= 0) return;
    fetch(key(cache, first), count * H * 2);
    fetch(value(cache, first), count * H * 2);
  }

  __device__ void attend(const Block &block, const float *qkv, u16 *attended, int position,
                         const u16 *cosine, const u16 *sine, float *shared) const {
    const int thread = this_thread(), warp = thread / 32, lane = thread % 32, part = lane % KEY_LANES;
    float *weights = shared + warp * (VALUE_STEPS * VALUES_AT_ONCE);
    float *sums = shared + WARPS * (VALUE_STEPS * VALUES_AT_ONCE); /* WARPS x COLUMNS */
    float *highest = sums + WARPS * COLUMNS, *totals = highest + WARPS, *owns = totals + WARPS;
    const float *here = qkv + pair / HEADS * 3 * D + pair % HEADS * H;
    float q[8], k[8], v = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4 a = load_new(here + part * 8 + 4 * i), b = load_new(here + D + part * 8 + 4 * i);
      q[4 * i] = __uint_as_float(a.x);
      q[4 * i + 1] = __uint_as_float(a.y);
      q[4 * i + 2] = __uint_as_float(a.z);
      q[4 * i + 3] = __uint_as_float(a.w);
      k[4 * i] = __uint_as_float(b.x);
      k[4 * i + 1] = __uint_as_float(b.y);
      k[4 * i + 2] = __uint_as_float(b.z);
      k[4 * i + 3] = __uint_as_float(b.w);
    }
    const int column = share * COLUMNS + threadIdx.x;
    if (threadIdx.x < COLUMNS) v = load_new_number(here + 2 * D + column);
    prepare(q, block.q_norm, cosine + position * (H / 2), sine + position * (H / 2));
    prepare(k, block.k_norm, cosine + position * (H / 2), sine + position * (H / 2));
    float own = 0;
    for (int i = 0; i < 8; i++) {
      q[i] *= rsqrtf((float)H);
      own += q[i] * k[i];
    }
    own = sum_over(own, 1, KEY_LANES);
    if (threadIdx.x == 0) *owns = own;

    float scores[KEY_STEPS], most = NOTHING, total = 0;
#pragma unroll
    for (int step = 0; step < KEY_STEPS; step++) {
      float numbers[8], score = 0;
      unpack(keys[step], numbers);
#pragma unroll
      for (int i = 0; i < 8; i++) score += q[i] * numbers[i];
      score = sum_over(score, 1, KEY_LANES);
      const int t = (step * WARPS + warp) * KEYS_AT_ONCE + lane / KEY_LANES;
      scores[step] = t < position ? score : NOTHING;
      most = fmaxf(most, scores[step]);
    }
    for (int i = KEY_LANES; i < 32; i *= 2)
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, i));
#pragma unroll
    for (int step = 0; step < KEY_STEPS; step++) {
      const float weight = scores[step] == NOTHING ? 0.0f : fast_exp(scores[step] - most);
      total += weight;
      if (part == 0) weights[step * KEYS_AT_ONCE + lane / KEY_LANES] = weight;
    }
    total = sum_over(total, KEY_LANES, 32);
    __syncwarp();
    float y[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
    for (int step = 0; step < VALUE_STEPS; step++) {
      const int i = step * VALUES_AT_ONCE + lane / VALUE_LANES;
      const float weight = i < KEY_STEPS * KEYS_AT_ONCE ? weights[i] : 0.0f;
      float numbers[8];
      unpack(values[step], numbers);
#pragma unroll
      for (int j = 0; j < 8; j++) y[j] += weight * numbers[j];
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      y[j] = sum_over(y[j], VALUE_LANES, 32);
      if (lane < VALUE_LANES) sums[warp * COLUMNS + lane * 8 + j] = y[j];
    }
    if (lane == 0) {
      highest[warp] = most;
      totals[warp] = total;
    }
    if (threadIdx.x < KEY_LANES && share == 0) {
      const uint4 eight = {round_pair(k[0], k[1]), round_pair(k[2], k[3]), round_pair(k[4], k[5]),
                           round_pair(k[6], k[7])};
      *(uint4 *)(key(block.cache, position) + part * 8) = eight;
    }
    __syncthreads();
    if (threadIdx.x < COLUMNS) {
      most = own = *owns;
      for (int i = 0; i < WARPS; i++) most = fmaxf(most, highest[i]);
      total = fast_exp(own - most);
      float result = total * v;
#pragma unroll
      for (int i = 0; i < WARPS; i++) {
        const float weight = fast_exp(highest[i] - most); /* 0 where a warp saw nothing */
        total += weight * totals[i];
        result += weight * sums[i * COLUMNS + threadIdx.x];
      }
      attended[pair / HEADS * D + pair % HEADS * H + column] = to_bfloat16(result / total);
      value(block.cache, position)[column] = to_bfloat16(v);
    }
  }
};

__device__ inline float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678118654752f)); }
__device__ inline float silu(float x) { return x / (1 + fast_exp(-x)); }

/* Adds what a matrix made of `x` to `before`. */
template <typename ATile, int SHARE>
__device__ void add_product(const ATile &tile, const u16 *x, const float *before, float *after,
                            float *sums) {
  const int thread = this_thread(), row = thread % SHARE, r = thread / SHARE;
  const int n = blockIdx.x * SHARE + row;
  const bool mine = thread < SHARE * ROWS && n < D;
  static_assert(SHARE * ROWS <= THREADS, "rows");
  float y = 0;
  if (mine) y = load_new_number(before + r * D + n);
  __syncthreads();
  tile.multiply_by(x, sums);
  __syncthreads();
  if (mine) after[r * D + n] = y + ATile::total(sums, row, r);
}

/* Scratch memory: for each block, states before and between its halves, then the last state; and
 * queries, keys and values; and in bfloat16 what attention and the first half of the feedforward
 * gave. Nothing is written twice in one step, so nothing old can be in a cache. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
read_token(const Block *blocks, const long long *tokens, const long long *place,
           const u16 *embedding, const u16 *positions, const u16 *cosine, const u16 *sine,
           const u16 *norm_weight, const u16 *norm_bias, float *states, float *qkv, u16 *attended,
           u16 *hidden, u16 *state, u32 *counters) {
  SHARED(memory);
  u16 *x = (u16 *)memory;
  float *sums = (float *)(memory + X_BYTES), *norm_sums = sums + SHARED_FLOATS - 2 * WARPS;
  const int position = (int)*place;
  u32 stage = 0;
  Attention attention;
  attention.place();
  attention.fetch_cache(blocks->cache, position);
  OutTile::fetch_rows(blocks->to_out);
  if (threadIdx.x < SHARE_D * ROWS) {
    const int r = threadIdx.x / SHARE_D, d = blockIdx.x * SHARE_D + threadIdx.x % SHARE_D;
    if (d < D)
      states[r * D + d] = to_float(embedding[(u64)tokens[r] * D + d]) +
                          to_float(positions[(u64)position * D + d]);
  }
  arrive(counters);
  Norm norm;
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    const Block &block = blocks[layer], &next = blocks[smaller(layer + 1, LAYERS - 1)];
    {
      QKVTile tile;
      tile.load(block.to_qkv);
      norm.load(block.attention_norm, block.attention_bias);
      ExpandTile::fetch_rows(block.expand);
      if (GATED) ExpandTile::fetch_rows(block.expand + (u64)F * D);
      wait(counters, ++stage);
      norm.apply(states, x, norm_sums);
      __syncthreads();
      tile.multiply_by(x, sums);
      __syncthreads();
      for (int i = this_thread(); i < SHARE_QKV * ROWS; i += THREADS) {
        const int row = i % SHARE_QKV, r = i / SHARE_QKV, n = blockIdx.x * SHARE_QKV + row;
        if (n < 3 * D) qkv[r * 3 * D + n] = QKVTile::total(sums, row, r);
      }
      arrive(counters);
    }
    attention.load(block.cache, position);
    ContractTile::fetch_rows(block.contract);
    wait(counters, ++stage);
    attention.attend(block, qkv, attended, position, cosine, sine, sums);
    arrive(counters);
    {
      OutTile tile;
      tile.load(block.to_out);
      QKVTile::fetch_rows(next.to_qkv);
      wait(counters, ++stage);
      copy_rows<D>(attended, x);
      add_product<OutTile, SHARE_D>(tile, x, states, states + ROWS * D, sums);
      arrive(counters);
    }
    {
      ExpandTile tile, values;
      tile.load(block.expand);
      if (GATED) values.load(block.expand + (u64)F * D);
      norm.load(block.feedforward_norm, block.feedforward_bias);
      attention.fetch_cache(next.cache, position);
      OutTile::fetch_rows(next.to_out);
      wait(counters, ++stage);
      norm.apply(states + ROWS * D, x, norm_sums);
      __syncthreads();
      tile.multiply_by(x, sums);
      if (GATED) values.multiply_by(x, sums + SUMS / 2);
      __syncthreads();
      for (int i = this_thread(); i < SHARE_F * ROWS; i += THREADS) {
        const int row = i % SHARE_F, r = i / SHARE_F, n = blockIdx.x * SHARE_F + row;
        float y = ExpandTile::total(sums, row, r);
        y = GATED ? silu(y) * ExpandTile::total(sums + SUMS / 2, row, r) : gelu(y);
        if (n < F) hidden[r * F + n] = to_bfloat16(y);
      }
      arrive(counters);
    }
    {
      ContractTile tile;
      tile.load(block.contract);
      wait(counters, ++stage);
      copy_rows<F>(hidden, x);
      add_product<ContractTile, SHARE_D>(tile, x, states + ROWS * D, states + 2 * ROWS * D, sums);
      arrive(counters);
    }
    states += 2 * ROWS * D;
    qkv += ROWS * 3 * D;
    attended += ROWS * D;
    hidden += ROWS * F;
  }
  if (blockIdx.x == 0) {
    norm.load(norm_weight, norm_bias);
    wait(counters, ++stage);
    norm.apply(states, x, norm_sums);
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * D; i += THREADS) state[i] = x[i / D * (D + PAD) + i % D];
    if (threadIdx.x == 0) *counters = 0; /* as the next step needs it; everybody has arrived */
  }
}
