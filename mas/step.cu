/* A whole one-token step of the GPT on a GPU, as one kernel that stays.
 *
 * In: a token a row, the matrices of all blocks, the cache of keys and values. Out: the state that
 * predicts the next token. mas/cuda_step.py compiles this file for one network and one number of
 * rows, whose sizes it defines (LAYERS ROWS D F HEADS H LENGTH PROGRAMS GATED QK_NORM ROTARY
 * NORM_EPSILON QK_EPSILON), and launches one program of 512 threads a multiprocessor.
 *
 * All programs go through all stages of all blocks. What one gives to the others it stores together
 * with the number of this launch, 64 bits at once, and who needs it loads it until that number is
 * there: no fence and no barrier between programs. Meanwhile the matrix of the stage is on its way
 * into registers; kernels of one matrix each would begin to load it only then. Products are left to
 * the tensor cores, where up to eight rows cost what one costs and the sum over K needs no exchange
 * between threads. Weights, and numbers on their way into a product, are bfloat16, everything else
 * float32.
 * After "Look Ma, No Bubbles!" (Hazy Research, 2025); numbers with flags as in NCCL's LL protocol.
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
constexpr int SHARE_F = 2 * CEIL(F, 2 * PROGRAMS); /* whole pairs */

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
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(address));
  return x;
}

/* 64 bits for other programs, and twice as many of theirs. */
__device__ inline void store_relaxed(u64 *address, u64 x) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(x) : "memory");
}

__device__ inline void load_relaxed(const u64 *address, u64 &a, u64 &b) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(address)
               : "memory");
}

__device__ inline void pause() {}

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

/* 32 bits for other programs. */
__device__ inline void give(u64 *address, u32 bits, u32 launch) {
  store_relaxed(address, (u64)launch << 32 | bits);
}

/* Waits for COUNT times two numbers `step` apart, which other programs give in this launch. */
template <int COUNT>
__device__ inline void take(const u64 *address, int step, u32 launch, u32 (&bits)[2 * COUNT]) {
  for (;;) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      u64 a, b;
      load_relaxed(address + i * step, a, b);
      bits[2 * i] = (u32)a;
      bits[2 * i + 1] = (u32)b;
      all = all && (u32)(a >> 32) == launch && (u32)(b >> 32) == launch;
    }
    if (all) return;
    pause();
  }
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
  __device__ void apply(const u64 *x, u32 launch, u16 *result, float *sums) const {
    const int thread = this_thread(), r = thread / ROW_THREADS, i0 = thread % ROW_THREADS;
    float v[FOURS][4], total = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
      const int d = 4 * (i0 + i * ROW_THREADS);
      u32 bits[4] = {0, 0, 0, 0};
      if (r < ROWS && d < D) take<2>(x + r * D + d, 2, launch, bits);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        v[i][j] = __uint_as_float(bits[j]);
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
    const float scale = rsqrtf(fmaxf(squares / D - mean * mean, 0.0f) + NORM_EPSILON);
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

/* R rows of K bfloat16 numbers, given in pairs; rows of the result have K + PAD. */
template <int K> __device__ void copy_rows(const u64 *x, u32 launch, u16 *result) {
  constexpr int FOURS = ROWS * K / 4, COUNT = smaller(4, CEIL(FOURS, THREADS));
#pragma unroll 1
  for (int first = this_thread(); first < FOURS; first += COUNT * THREADS) {
    u32 bits[2 * COUNT];
    /* The last ones may be taken twice rather than from behind the end. */
    const int step = first + (COUNT - 1) * THREADS < FOURS ? THREADS : 0;
    take<COUNT>(x + 2 * first, 2 * step, launch, bits);
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
      const int i = first + j * step;
      *(uint2 *)(result + 4 * i / K * (K + PAD) + 4 * i % K) = {bits[2 * j], bits[2 * j + 1]};
    }
    if (COUNT > 1 && step == 0)
      for (int i = first + THREADS; i < FOURS; i += THREADS) {
        u32 two[2];
        take<1>(x + 2 * i, 0, launch, two);
        *(uint2 *)(result + 4 * i / K * (K + PAD) + 4 * i % K) = {two[0], two[1]};
      }
    if (step == 0) return;
  }
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

  __device__ void attend(const Block &block, const u64 *qkv, u64 *attended, u32 launch,
                         int position, const u16 *cosine, const u16 *sine, float *shared) const {
    const int thread = this_thread(), warp = thread / 32, lane = thread % 32;
    const int part = lane % KEY_LANES;
    float *weights = shared + warp * (VALUE_STEPS * VALUES_AT_ONCE);
    float *sums = shared + WARPS * (VALUE_STEPS * VALUES_AT_ONCE); /* WARPS x COLUMNS */
    float *highest = sums + WARPS * COLUMNS, *totals = highest + WARPS, *owns = totals + WARPS;
    const u64 *here = qkv + pair / HEADS * 3 * D + pair % HEADS * H;
    const int column = share * COLUMNS + 2 * thread; /* of two that this thread finishes */
    u32 bits[8], v[2] = {0, 0};
    float q[8];
    take<4>(here + part * 8, 2, launch, bits);
#pragma unroll
    for (int i = 0; i < 8; i++) q[i] = __uint_as_float(bits[i]);
    prepare(q, block.q_norm, cosine + position * (H / 2), sine + position * (H / 2));
#pragma unroll
    for (int i = 0; i < 8; i++) q[i] *= rsqrtf((float)H);
    if (warp == 0) { /* the token itself */
      float k[8], own = 0;
      take<4>(here + D + part * 8, 2, launch, bits);
#pragma unroll
      for (int i = 0; i < 8; i++) k[i] = __uint_as_float(bits[i]);
      prepare(k, block.k_norm, cosine + position * (H / 2), sine + position * (H / 2));
#pragma unroll
      for (int i = 0; i < 8; i++) own += q[i] * k[i];
      own = sum_over(own, 1, KEY_LANES);
      if (lane == 0) *owns = own;
      if (lane < KEY_LANES && share == 0) {
        const uint4 eight = {round_pair(k[0], k[1]), round_pair(k[2], k[3]),
                             round_pair(k[4], k[5]), round_pair(k[6], k[7])};
        *(uint4 *)(key(block.cache, position) + part * 8) = eight;
      }
    }
    if (thread < COLUMNS / 2) take<1>(here + 2 * D + column, 0, launch, v);

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
    __syncthreads();
    if (thread < COLUMNS / 2) {
      most = *owns;
      for (int i = 0; i < WARPS; i++) most = fmaxf(most, highest[i]);
      total = fast_exp(*owns - most);
      float first = total * __uint_as_float(v[0]), second = total * __uint_as_float(v[1]);
#pragma unroll
      for (int i = 0; i < WARPS; i++) {
        const float weight = fast_exp(highest[i] - most); /* 0 where a warp saw nothing */
        total += weight * totals[i];
        first += weight * sums[i * COLUMNS + 2 * thread];
        second += weight * sums[i * COLUMNS + 2 * thread + 1];
      }
      give(attended + (pair / HEADS * D + pair % HEADS * H + column) / 2,
           round_pair(first / total, second / total), launch);
      *(u32 *)(value(block.cache, position) + column) =
          round_pair(__uint_as_float(v[0]), __uint_as_float(v[1]));
    }
  }
};

__device__ inline float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678118654752f)); }
__device__ inline float silu(float x) { return x / (1 + fast_exp(-x)); }

/* Scratch memory: the state before each half of each block and after the last; queries, keys and
 * values; what attention and the first half of the feedforward gave, in pairs. Each number has a
 * place of its own in every block, so no launch writes a place twice. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
read_token(const Block *blocks, const long long *tokens, const long long *place,
           const u16 *embedding, const u16 *positions, const u16 *cosine, const u16 *sine,
           const u16 *norm_weight, const u16 *norm_bias, u64 *states, u64 *qkv, u64 *attended,
           u64 *hidden, u16 *state, const u32 *launches) {
  SHARED(memory);
  u16 *x = (u16 *)memory;
  float *sums = (float *)(memory + X_BYTES), *norm_sums = sums + SHARED_FLOATS - 2 * WARPS;
  const int position = (int)*place;
  const u32 launch = *launches;
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
    give(states + own_r * D + own_d, __float_as_uint(own), launch);
  }
  Norm norm;
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    const Block &block = blocks[layer];
    u64 *between = states + ROWS * D, *after = between + ROWS * D;
    {
      QKVTile tile;
      tile.load(block.to_qkv);
      norm.load(block.attention_norm, block.attention_bias);
      norm.apply(states, launch, x, norm_sums);
      __syncthreads();
      tile.multiply_by(x, sums);
      __syncthreads();
      for (int i = this_thread(); i < SHARE_QKV * ROWS; i += THREADS) {
        const int row = i % SHARE_QKV, r = i / SHARE_QKV, n = blockIdx.x * SHARE_QKV + row;
        if (n < 3 * D)
          give(qkv + r * 3 * D + n, __float_as_uint(QKVTile::total(sums, row, r)), launch);
      }
    }
    attention.load(block.cache, position);
    __syncthreads(); /* the sums have been read */
    attention.attend(block, qkv, attended, launch, position, cosine, sine, sums);
    {
      OutTile tile;
      tile.load(block.to_out);
      copy_rows<D>(attended, launch, x);
      __syncthreads();
      tile.multiply_by(x, sums);
      __syncthreads();
      if (owner) {
        own += OutTile::total(sums, own_row, own_r);
        give(between + own_r * D + own_d, __float_as_uint(own), launch);
      }
    }
    {
      ExpandTile tile, values;
      tile.load(block.expand);
      if (GATED) values.load(block.expand + (u64)F * D);
      norm.load(block.feedforward_norm, block.feedforward_bias);
      norm.apply(between, launch, x, norm_sums);
      __syncthreads();
      tile.multiply_by(x, sums);
      if (GATED) values.multiply_by(x, sums + SUMS / 2);
      __syncthreads();
      for (int i = this_thread(); i < SHARE_F / 2 * ROWS; i += THREADS) {
        const int row = i % (SHARE_F / 2) * 2, r = i / (SHARE_F / 2);
        const int n = blockIdx.x * SHARE_F + row;
        float y[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          y[j] = ExpandTile::total(sums, row + j, r);
          y[j] = GATED ? silu(y[j]) * ExpandTile::total(sums + SUMS / 2, row + j, r) : gelu(y[j]);
        }
        if (n < F) give(hidden + (r * F + n) / 2, round_pair(y[0], y[1]), launch);
      }
    }
    {
      ContractTile tile;
      tile.load(block.contract);
      copy_rows<F>(hidden, launch, x);
      __syncthreads();
      tile.multiply_by(x, sums);
      __syncthreads();
      if (owner) {
        own += ContractTile::total(sums, own_row, own_r);
        give(after + own_r * D + own_d, __float_as_uint(own), launch);
      }
    }
    states = after;
    qkv += ROWS * 3 * D;
    attended += ROWS * D / 2;
    hidden += ROWS * F / 2;
  }
  if (blockIdx.x == 0) {
    norm.load(norm_weight, norm_bias);
    norm.apply(states, launch, x, norm_sums);
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * D; i += THREADS) state[i] = x[i / D * (D + PAD) + i % D];
  }
}
