/* What mas/step.cu asks of a GPU beyond CUDA C++: PTX, with names.
 *
 * COPY_ENGINE says whether the device has an engine that copies whole rows (compute capability 9.0);
 * the threads copy 16 bytes each where it has none. tests/mas/step_emulator.h has the same for a
 * CPU. */

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

/* 32 bits for other programs, and four times as many of theirs. */
__device__ inline void give(u32 *address, u32 x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}

__device__ inline void load_relaxed(const u32 *address, u32 x[4]) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "l"(address)
               : "memory");
}

/* Barriers in shared memory count the bytes that arrive there. */
__device__ inline u32 shared_address(const void *x) { return (u32)__cvta_generic_to_shared(x); }

__device__ inline void start_barrier(u64 *barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

__device__ inline void show_barriers() {
#if COPY_ENGINE
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

__device__ inline void await(const u64 *barrier, int parity) {
  u32 done;
  do {
    asm volatile("{\n.reg .pred p;\n"
#if COPY_ENGINE
                 "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
#else
                 "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
#endif
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!done);
}

#if COPY_ENGINE
/* By one thread, before the copies. */
__device__ inline void announce(u64 *barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ inline void copy(void *to, const void *from, int bytes, u64 *barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
               "[%3];" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ inline void arrive(u64 *) {}
#else
__device__ inline void announce(u64 *, int) {}

/* By every thread, after its copies. */
__device__ inline void arrive(u64 *barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ inline void copy(void *to, const void *from, int, u64 *) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
#endif

__device__ inline u32 count_up(u32 *address) { return atomicAdd(address, 1u); }

__device__ inline void pause() {} /* sleeping between two looks made it slower */
