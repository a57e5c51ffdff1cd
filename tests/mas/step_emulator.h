/* A CPU that runs mas/step.cu: every thread of every program as a fiber, one after the other.
 *
 * Included before the file, which is compiled with EMULATED. What threads of a warp exchange, they
 * exchange when all 32 have come; what a program waits for is waited for by trying again later. */

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <ucontext.h>
#include <vector>

#define pause pause_program /* unistd.h has another */

#define __device__
#define __global__
#define __launch_bounds__(...)
#define SHARED(name) unsigned char *name = emulated->shared

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { int x; };

struct Message { unsigned words[6]; };

struct Meeting { /* of the threads of a warp or a program */
  int arrived = 0;
  long round = 0;
};

struct Warp : Meeting { Message slots[2][32]; };

struct Program {
  unsigned char *shared;
  Meeting all;
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t context;
  Program *program;
  Index thread, block;
  std::vector<char> stack;
  bool done = false;
};

static Index threadIdx, blockIdx;
static Program *emulated;
static Fiber *running;
static ucontext_t scheduler;

static void let_others_run() { swapcontext(&running->context, &scheduler); }

static void meet(Meeting &meeting, int threads) {
  const long round = meeting.round;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    meeting.round++;
  }
  while (meeting.round == round) let_others_run();
}

static void __syncthreads() { meet(emulated->all, (int)emulated->warps.size() * 32); }

static const Message *exchange(const Message &message) {
  Warp &warp = emulated->warps[threadIdx.x / 32];
  Message *slots = warp.slots[warp.round % 2];
  slots[threadIdx.x % 32] = message;
  meet(warp, 32);
  return slots;
}

static void __syncwarp() { exchange({}); }

static float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

static unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}

static float __shfl_xor_sync(unsigned, float x, int mask) {
  return __uint_as_float(exchange({{__float_as_uint(x)}})[threadIdx.x % 32 ^ mask].words[0]);
}

static int this_thread() { return threadIdx.x; }
static float fast_exp(float x) { return std::exp(x); }
static float inverse_root(float x) { return 1 / std::sqrt(x); }
#define rsqrtf inverse_root /* newer C libraries have one of this name */

static unsigned rounded(float x) { /* to the nearest bfloat16, ties to even */
  const unsigned bits = __float_as_uint(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static unsigned round_pair(float low, float high) { return rounded(low) | rounded(high) << 16; }

static float number(unsigned pair, int i) {
  return __uint_as_float(i ? pair & 0xffff0000u : pair << 16);
}

/* mma.m16n8k16: which thread holds what is said in the PTX manual, "Matrix Fragments". */
static void multiply(float sums[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                     unsigned b1) {
  const Message *all = exchange({{a0, a1, a2, a3, b0, b1}});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const Message &a = all[row % 8 * 4 + k % 8 / 2], &b = all[column * 4 + k % 8 / 2];
      sums[i] += number(a.words[row / 8 + k / 8 * 2], k % 2) * number(b.words[4 + k / 8], k % 2);
    }
  }
}

static uint4 load_constant(const void *address) {
  if ((size_t)address % 16) abort();
  return *(const uint4 *)address;
}
static void give(unsigned *address, unsigned x) { *address = x; }
static void load_relaxed(const unsigned *address, unsigned x[4]) {
  if ((size_t)address % 16) abort();
  memcpy(x, address, 16);
}
static unsigned count_up(unsigned *address) { return (*address)++; }

/* A barrier in shared memory and the copies it waits for, which arrive at once or, if LATE, not
 * before somebody waits. */
struct Copy { void *to; const void *from; int bytes; };
struct Barrier {
  int arrivals, missing, bytes = 0, phase = 0;
  std::vector<Copy> copies;

  void turn() {
    if (missing || bytes) return;
    missing = arrivals;
    phase ^= 1;
  }
};
static std::map<const void *, Barrier> barriers;

static void start_barrier(const void *barrier, int arrivals) {
  barriers[barrier] = {arrivals, arrivals};
}
static void show_barriers() {}
static void land(Barrier &barrier) {
  for (const Copy &x : barrier.copies) {
    memcpy(x.to, x.from, x.bytes);
    barrier.bytes -= x.bytes;
  }
  barrier.copies.clear();
  barrier.turn();
}
static void announce(const void *place, int bytes) {
  if (!COPY_ENGINE) return;
  Barrier &barrier = barriers.at(place);
  barrier.bytes += bytes;
  barrier.missing--;
  if (!LATE) land(barrier);
}
static void arrive(const void *place) {
  if (COPY_ENGINE) return;
  Barrier &barrier = barriers.at(place);
  barrier.missing--;
  if (!LATE) land(barrier);
}
static void copy(void *to, const void *from, int bytes, const void *place) {
  Barrier &barrier = barriers.at(place);
  if ((size_t)to % 16 || (size_t)from % 16 || bytes % 16) abort();
  if (!COPY_ENGINE) barrier.bytes += bytes; /* else they were announced */
  barrier.copies.push_back({to, from, bytes});
  if (!LATE) land(barrier);
}
static void await(const void *place, int parity) {
  Barrier &barrier = barriers.at(place);
  while (barrier.phase == parity) {
    land(barrier);
    if (barrier.phase == parity) let_others_run();
  }
}

static void pause() { let_others_run(); }
template <typename Kernel>
static void run_programs(int programs, int threads, int shared, Kernel kernel) {
  static Kernel *entry;
  entry = &kernel;
  std::vector<Program> all(programs);
  std::vector<Fiber> fibers(programs * threads);
  for (auto &program : all) {
    program.shared = (unsigned char *)aligned_alloc(128, (shared + 127) / 128 * 128);
    memset(program.shared, 0xff, shared); /* not a number */
    program.warps.resize(threads / 32);
  }
  for (int i = 0; i < programs * threads; i++) {
    Fiber &fiber = fibers[i];
    fiber.program = &all[i / threads];
    fiber.block.x = i / threads;
    fiber.thread.x = i % threads;
    fiber.stack.resize(1 << 15);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, (void (*)())(+[] { (*entry)(); running->done = true; }), 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (auto &fiber : fibers) {
      if (fiber.done) continue;
      left = true;
      running = &fiber;
      emulated = fiber.program;
      threadIdx = fiber.thread;
      blockIdx = fiber.block;
      swapcontext(&scheduler, &fiber.context);
    }
  }
  for (auto &program : all) free(program.shared);
}

#define EMULATED
