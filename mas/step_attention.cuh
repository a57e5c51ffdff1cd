/* The attention of mas/step.cu: one program takes one head of one row, or shares it with others. */

/* Norms and rotates a query or key as the network wants it. Four threads share it: this one's are
 * eight of every chunk. */
__device__ void prepare(float (&x)[8 * KEY_CHUNKS], const u16 *norm, const u16 *cosine,
                        const u16 *sine) {
  const int part = threadIdx.x % 4;
  if (QK_NORM) {
    float squares = 0, weight[8];
#pragma unroll
    for (int i = 0; i < 8 * KEY_CHUNKS; i++) squares += x[i] * x[i];
    const float scale = rsqrtf(sum_over(squares, 1, 4) / H + QK_EPSILON);
#pragma unroll
    for (int chunk = 0; chunk < KEY_CHUNKS; chunk++) {
      unpack(*(const uint4 *)(norm + chunk * CHUNK + part * 8), weight);
#pragma unroll
      for (int i = 0; i < 8; i++) x[8 * chunk + i] *= scale * weight[i];
    }
  }
  if (ROTARY) { /* pairs are half a head apart */
    float c[8], s[8];
    if (KEY_CHUNKS == 1) {
      unpack(load_constant(cosine + part % 2 * 8), c);
      unpack(load_constant(sine + part % 2 * 8), s);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float other = __shfl_xor_sync(0xffffffffu, x[i], 2);
        x[i] = x[i] * c[i] + (part < 2 ? -other : other) * s[i];
      }
    } else {
#pragma unroll
      for (int chunk = 0; chunk < KEY_CHUNKS / 2; chunk++) {
        unpack(load_constant(cosine + chunk * CHUNK + part * 8), c);
        unpack(load_constant(sine + chunk * CHUNK + part * 8), s);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float a = x[8 * chunk + i], b = x[8 * (chunk + KEY_CHUNKS / 2) + i];
          x[8 * chunk + i] = a * c[i] - b * s[i];
          x[8 * (chunk + KEY_CHUNKS / 2) + i] = a * s[i] + b * c[i];
        }
      }
    }
  }
}

/* Stores keys and values of a token and lets it see all up to it. One program takes one head of one
 * row and some columns of its values; one too many repeats the last work. */
struct Attention {
  uint4 keys[KEY_STEPS][KEY_CHUNKS], values[VALUE_STEPS];
  int pair, share;

  __device__ void place() {
    const int task = smaller(blockIdx.x, TASKS * SHARES - 1);
    pair = task / SHARES; /* a head of a row */
    share = task % SHARES;
  }

  __device__ u16 *key(u16 *cache, int t) const { return cache + ((u64)pair * LENGTH + t) * H; }
  __device__ u16 *value(u16 *cache, int t) const { return key(cache, t) + (u64)TASKS * LENGTH * H; }

  /* The position of the i-th key of this warp: warps take eight in turn. */
  __device__ static int at(int i) {
    return (i / KEYS_AT_ONCE * WARPS + this_thread() / 32) * KEYS_AT_ONCE + i % KEYS_AT_ONCE;
  }

  /* Eight keys as the tensor cores want a matrix of eight rows; of the values some columns. */
  __device__ void load(u16 *cache, int position) {
    const int lane = this_thread() % 32;
#pragma unroll
    for (int step = 0; step < KEY_STEPS; step++) {
      const int t = at(step * KEYS_AT_ONCE + lane / 4);
#pragma unroll
      for (int chunk = 0; chunk < KEY_CHUNKS; chunk++) {
        keys[step][chunk] = {0, 0, 0, 0};
        if (t < position)
          keys[step][chunk] = load_constant(key(cache, t) + chunk * CHUNK + lane % 4 * 8);
      }
    }
#pragma unroll
    for (int step = 0; step < VALUE_STEPS; step++) {
      const int t = at(step * VALUES_AT_ONCE + lane / VALUE_LANES);
      values[step] = {0, 0, 0, 0};
      if (t < position)
        values[step] =
            load_constant(value(cache, t) + share * COLUMNS + lane % VALUE_LANES * 8);
    }
  }

  __device__ void attend(const Block &block, const u32 *qkv, u32 *attended, int position,
                         const u16 *norms, const u16 *cosine, const u16 *sine,
                         float *shared) const {
    const int thread = this_thread(), warp = thread / 32, lane = thread % 32, part = lane % 4;
    float *weights = shared + warp * (VALUE_STEPS * VALUES_AT_ONCE);
    float *sums = shared + WARPS * (VALUE_STEPS * VALUES_AT_ONCE); /* WARPS x COLUMNS */
    float *highest = sums + WARPS * COLUMNS, *totals = highest + WARPS, *owns = totals + WARPS;
    const u32 *here = qkv + pair / HEADS * 3 * D + pair % HEADS * H;
    const int column = share * COLUMNS + 2 * thread; /* of two that this thread finishes */
    const bool finishes = thread < COLUMNS / 2;

    /* Of every eight threads four hold the query, the others the token's own key. */
    const bool is_key = lane / 4 % 2;
    constexpr int LOADS = 2 * KEY_CHUNKS;
    u32 bits[4 * (LOADS + 1)];
    take<LOADS + 1>(
        [&](int i) {
          return i == LOADS ? here + 2 * D + column / 4 * 4
                            : here + is_key * D + i / 2 * CHUNK + part * 8 + i % 2 * 4;
        },
        LOADS + finishes, bits);
    float x[8 * KEY_CHUNKS];
#pragma unroll
    for (int i = 0; i < 8 * KEY_CHUNKS; i++) x[i] = __uint_as_float(bits[i]);
    prepare(x, norms + is_key * H, cosine + position * (H / 2), sine + position * (H / 2));
    if (!is_key)
#pragma unroll
      for (int i = 0; i < 8 * KEY_CHUNKS; i++) x[i] *= rsqrtf((float)H);
    uint4 packed[KEY_CHUNKS];
#pragma unroll
    for (int chunk = 0; chunk < KEY_CHUNKS; chunk++) {
      const float *eight = x + 8 * chunk;
      packed[chunk] = {round_pair(eight[0], eight[1]), round_pair(eight[2], eight[3]),
                       round_pair(eight[4], eight[5]), round_pair(eight[6], eight[7])};
    }
    if (warp == 0) { /* the token itself */
      float own = 0;
#pragma unroll
      for (int i = 0; i < 8 * KEY_CHUNKS; i++) own += x[i] * __shfl_xor_sync(0xffffffffu, x[i], 4);
      own = sum_over(own, 1, 4);
      if (lane == 0) *owns = own;
      if (lane / 4 == 1 && share == 0)
#pragma unroll
        for (int chunk = 0; chunk < KEY_CHUNKS; chunk++)
          *(uint4 *)(key(block.cache, position) + chunk * CHUNK + part * 8) = packed[chunk];
    }
    if (lane >= 4) /* the query alone is a column of the other matrix */
#pragma unroll
      for (int chunk = 0; chunk < KEY_CHUNKS; chunk++) packed[chunk] = {0, 0, 0, 0};

    float scores[KEY_STEPS], most = NOTHING, total = 0; /* of key lane / 4 in every fourth thread */
#pragma unroll
    for (int step = 0; step < KEY_STEPS; step++) {
      float c[4] = {0, 0, 0, 0};
#pragma unroll
      for (int chunk = 0; chunk < KEY_CHUNKS; chunk++) {
        const uint4 a = keys[step][chunk], b = packed[chunk];
        multiply(c, a.x, 0, a.y, 0, b.x, b.y);
        multiply(c, a.z, 0, a.w, 0, b.z, b.w);
      }
      const bool seen = part == 0 && at(step * KEYS_AT_ONCE + lane / 4) < position;
      scores[step] = seen ? c[0] : NOTHING;
      most = fmaxf(most, scores[step]);
    }
    for (int i = 4; i < 32; i *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, i));
#pragma unroll
    for (int step = 0; step < KEY_STEPS; step++) {
      const float weight = scores[step] == NOTHING ? 0.0f : fast_exp(scores[step] - most);
      total += weight;
      if (part == 0) weights[step * KEYS_AT_ONCE + lane / 4] = weight;
    }
    total = sum_over(total, 4, 32);
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
    /* The sum over the threads of a column; at first each of two gives the other half of theirs. */
    int first = lane % VALUE_LANES * 8;
#pragma unroll
    for (int mask = 16, left = 8; mask >= VALUE_LANES; mask /= 2) {
      const bool upper = lane & mask;
      if (left == 1) {
        y[0] += __shfl_xor_sync(0xffffffffu, y[0], mask);
        continue;
      }
      left /= 2;
      first += upper ? left : 0;
#pragma unroll
      for (int j = 0; j < left; j++) {
        const float other = __shfl_xor_sync(0xffffffffu, upper ? y[j] : y[j + left], mask);
        y[j] = (upper ? y[j + left] : y[j]) + other;
      }
    }
    constexpr int LEFT = larger(1, 8 * VALUE_LANES / 32);
#pragma unroll
    for (int j = 0; j < LEFT; j++) sums[warp * COLUMNS + first + j] = y[j];
    if (lane == 0) {
      highest[warp] = most;
      totals[warp] = total;
    }
    __syncthreads();
    if (finishes) {
      const u32 *four = bits + 4 * LOADS;
      const float v[2] = {__uint_as_float(column % 4 ? four[2] : four[0]),
                          __uint_as_float(column % 4 ? four[3] : four[1])};
      most = *owns;
#pragma unroll
      for (int i = 0; i < WARPS; i++) most = fmaxf(most, highest[i]);
      total = fast_exp(*owns - most);
      float a = total * v[0], b = total * v[1];
#pragma unroll
      for (int i = 0; i < WARPS; i++) {
        const float weight = fast_exp(highest[i] - most); /* 0 where a warp saw nothing */
        total += weight * totals[i];
        a += weight * sums[i * COLUMNS + 2 * thread];
        b += weight * sums[i * COLUMNS + 2 * thread + 1];
      }
      give(attended + (pair / HEADS * D + pair % HEADS * H + column) / 2,
           round_pair(a / total, b / total));
      *(u32 *)(value(block.cache, position) + column) = round_pair(v[0], v[1]);
    }
  }
};
