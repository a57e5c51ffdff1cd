/* The matrices of mas/step.cu: how a program shares in them, their way into shared memory, their
 * products, and how memory is divided. */

/* The rows of a matrix that belong to this program, in shared memory. A thread reads what the tensor
 * cores want of it. Groups of 16 rows x CHUNK go round the warps. */
template <int N, int K, int SHARE> struct Tile {
  static constexpr int GROUPS = power_below(2 * CEIL(SHARE, 16) - 1); /* of 16 rows, 1 2 4 … */
  static constexpr int SPLITS = WARPS / GROUPS;                       /* of K */
  static constexpr int STEPS = CEIL(K / CHUNK, SPLITS); /* chunks a warp */
  static constexpr int HALVES = SHARE > 8 ? 2 : 1; /* of 16 rows */
  static constexpr int CHUNKS = K / CHUNK, BYTES = SHARE * K * 2;
  static_assert(GROUPS <= WARPS && K % CHUNK == 0, "sizes");

  __device__ static int bytes() {
    return larger(0, smaller(SHARE, N - (int)blockIdx.x * SHARE)) * K * 2;
  }

  /* Into sums[(split * GROUPS * 16 + row) * ROWS + r]; x is bfloat16, R rows of K + PAD. */
  __device__ static void multiply_by(const unsigned char *place, const u16 *x, float *sums) {
    const int thread = this_thread(), warp = thread / 32, lane = thread % 32;
    const int group = warp % GROUPS, split = warp / GROUPS, r = lane / 4;
    const unsigned char *rows[HALVES]; /* behind the last it is repeated; nobody reads their sums */
#pragma unroll
    for (int half = 0; half < HALVES; half++)
      rows[half] = place + smaller(group * 16 + half * 8 + r, SHARE - 1) * K * 2 + lane % 4 * 16;
    float c[4][4] = {}; /* of which each waits for its own last product alone */
    /* Two chunks at a time. Every second row begins with the second: rows lie on the same banks. */
#pragma unroll
    for (int step = 0; step < STEPS; step += 2) {
      const int chunk = split * STEPS + step;
      if (chunk >= CHUNKS) break;
      const bool two = step + 1 < STEPS && chunk + 1 < CHUNKS, turned = two && r % 2;
      uint4 a[HALVES][2], b[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        b[i] = {0, 0, 0, 0};
        if (r < ROWS && (i == 0 || two))
          b[i] = *(const uint4 *)(x + r * (K + PAD) + (chunk + i) * CHUNK + lane % 4 * 8);
      }
#pragma unroll
      for (int half = 0; half < HALVES; half++) {
        uint4 first = *(const uint4 *)(rows[half] + (chunk + turned) * CHUNK * 2), second = first;
        if (two) second = *(const uint4 *)(rows[half] + (chunk + 1 - turned) * CHUNK * 2);
        a[half][0] = turned ? second : first;
        a[half][1] = turned ? first : second;
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (i == 1 && !two) break;
        const uint4 low = a[0][i];
        uint4 high = {0, 0, 0, 0};
        if (HALVES == 2) high = a[HALVES - 1][i];
        multiply(c[2 * i], low.x, high.x, low.y, high.y, b[i].x, b[i].y);
        multiply(c[2 * i + 1], low.z, high.z, low.w, high.w, b[i].z, b[i].w);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * HALVES; i++) {
      const int row = group * 16 + i / 2 * 8 + lane / 4, column = lane % 4 * 2 + i % 2;
      const float sum = c[0][i] + c[1][i] + (c[2][i] + c[3][i]);
      if (column < ROWS) sums[(split * GROUPS * 16 + row) * ROWS + column] = sum;
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

/* What is loaded together, three times a block: into queries, keys, values, and out of them, with
 * their norms; into the feedforward, with its norm; out of it. */
constexpr int ITEMS = 3;
constexpr int LAST = ITEMS * LAYERS; /* the norm behind the last block */
constexpr int ROUND = 128;
constexpr int SLOT = CEIL(larger(QKVTile::BYTES + OutTile::BYTES,
                                 larger((GATED ? 2 : 1) * ExpandTile::BYTES, ContractTile::BYTES)),
                          ROUND) * ROUND;

/* Bytes of shared memory. */
constexpr int X_BYTES = ROWS * (WIDEST + PAD) * 2;
constexpr int SUMS = ROWS * WARPS * 16; /* floats of one product */
constexpr int SUMS_BYTES = SUMS * (GATED ? 2 : 1) * 4;
constexpr int KEYS_AT_ONCE = 8, KEY_CHUNKS = H / CHUNK;
constexpr int KEY_STEPS = CEIL(LENGTH, WARPS * KEYS_AT_ONCE);
constexpr int VALUE_LANES = COLUMNS / 8, VALUES_AT_ONCE = 32 / VALUE_LANES;
constexpr int VALUE_STEPS = CEIL(KEY_STEPS * KEYS_AT_ONCE, VALUES_AT_ONCE);
constexpr int ATTENTION_BYTES =
    CEIL(WARPS * (VALUE_STEPS * VALUES_AT_ONCE + COLUMNS + 2) + 1, 4) * 16;
constexpr int NORM_SUM_BYTES = 2 * WARPS * 4;
constexpr int NORM = D * (GATED ? 1 : 2), QK_NORMS = QK_NORM ? 2 * H : 0; /* numbers */
constexpr int NORMS_BYTES = (2 * NORM + QK_NORMS) * 2; /* of attention, queries, keys; feedforward */
constexpr int BARRIER_BYTES = 32; /* and the number of the launch */
constexpr int BLOCKS_BYTES = LAYERS * (int)sizeof(Block);
constexpr int OTHER_BYTES =
    X_BYTES + SUMS_BYTES + ATTENTION_BYTES + NORM_SUM_BYTES + NORMS_BYTES + BARRIER_BYTES +
    BLOCKS_BYTES;
constexpr int SLOTS = smaller(ITEMS, (SHARED_LIMIT - OTHER_BYTES) / SLOT);
static_assert(SLOTS > 1, "too little shared memory");
constexpr int SHARED_BYTES = SLOTS * SLOT + OTHER_BYTES;

/* Words of scratch memory: the state before each half of each block and after the last; queries,
 * keys and values; what attention and the first half of the feedforward gave, in pairs. Each number
 * has a place of its own in every block. There are two such memories: a launch uses one and empties
 * the other. */
constexpr int STATE_WORDS = ROWS * D, QKV_WORDS = 3 * ROWS * D, ATTENDED_WORDS = ROWS * D / 2,
              HIDDEN_WORDS = ROWS * F / 2;
constexpr int LAYER_WORDS = 2 * STATE_WORDS + QKV_WORDS + ATTENDED_WORDS + HIDDEN_WORDS;
constexpr int SCRATCH_WORDS = LAYERS * LAYER_WORDS + STATE_WORDS;
extern "C" { /* for who launches the kernel */
__device__ int shared_bytes = SHARED_BYTES;
__device__ int scratch_words = SCRATCH_WORDS;
}

/* Sends some bytes on their way, by one thread with the copy engine, else by all. */
__device__ inline void request_bytes(const void *from, void *to, int bytes, u64 *barrier) {
#if COPY_ENGINE
  if (bytes > 0) copy(to, from, bytes, barrier);
#else
  for (int i = 16 * this_thread(); i < bytes; i += 16 * THREADS)
    copy((unsigned char *)to + i, (const unsigned char *)from + i, 16, barrier);
#endif
}

/* Brings the matrices, item by item, into the slots in turn, and the norms, which come with them,
 * into places of their own. */
struct Stream {
  unsigned char *slots;
  u16 *norms, *more_norms; /* in front of attention, with queries' and keys'; of the feedforward */
  u64 *barriers;
  const Block *blocks;
  const u16 *last_weight, *last_bias;

  __device__ unsigned char *slot(int item) const { return slots + item % SLOTS * SLOT; }

  __device__ void wait(int item) const { await(barriers + item % SLOTS, item / SLOTS & 1); }

  __device__ static void request_norm(const u16 *weight, const u16 *bias, u16 *to, u64 *barrier) {
    request_bytes(weight, to, D * 2, barrier);
    if (!GATED) request_bytes(bias, to + D, D * 2, barrier);
  }

  template <class Tile>
  __device__ static void request_rows(const u16 *matrix, unsigned char *to, u64 *barrier) {
    const u64 first = (u64)blockIdx.x * Tile::BYTES;
    request_bytes((const unsigned char *)matrix + first, to, Tile::bytes(), barrier);
  }

  /* By all threads, when all are done with this item of the block before and with the slot. */
  __device__ void request(int item) const {
    if (item > LAST || (item == LAST && blockIdx.x > 0)) return; /* one program needs the last */
    if (COPY_ENGINE && this_thread() != THREADS - 1) return;
    const Block &block = blocks[item / ITEMS];
    unsigned char *to = slot(item);
    u64 *barrier = barriers + item % SLOTS;
    if (item == LAST) {
      announce(barrier, NORM * 2);
      request_norm(last_weight, last_bias, norms, barrier);
    } else if (item % ITEMS == 0) {
      announce(barrier, (NORM + QK_NORMS) * 2 + QKVTile::bytes() + OutTile::bytes());
      request_norm(block.attention_norm, block.attention_bias, norms, barrier);
      if (QK_NORM) {
        request_bytes(block.q_norm, norms + NORM, H * 2, barrier);
        request_bytes(block.k_norm, norms + NORM + H, H * 2, barrier);
      }
      request_rows<QKVTile>(block.to_qkv, to, barrier);
      request_rows<OutTile>(block.to_out, to + QKVTile::BYTES, barrier);
    } else if (item % ITEMS == 1) {
      announce(barrier, NORM * 2 + (GATED ? 2 : 1) * ExpandTile::bytes());
      request_norm(block.feedforward_norm, block.feedforward_bias, more_norms, barrier);
      request_rows<ExpandTile>(block.expand, to, barrier);
      if (GATED)
        request_rows<ExpandTile>(block.expand + (u64)F * D, to + ExpandTile::BYTES, barrier);
    } else {
      announce(barrier, ContractTile::bytes());
      request_rows<ContractTile>(block.contract, to, barrier);
    }
    if (!COPY_ENGINE) arrive(barrier);
  }
};
