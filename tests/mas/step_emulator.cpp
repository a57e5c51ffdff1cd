/* mas/step.cu for a CPU; see step_emulator.h. */
#include "step_emulator.h"

#include "../../mas/step.cu"

extern "C" void emulate(const Block *blocks, const long long *tokens, const long long *place,
                        const u16 *embedding, const u16 *positions, const u16 *cosine,
                        const u16 *sine, const u16 *norm_weight, const u16 *norm_bias,
                        u64 *states, u64 *qkv, u64 *attended, u64 *hidden, u16 *state,
                        const u32 *launches) {
  run_programs(PROGRAMS, THREADS, SHARED_BYTES, [&] {
    read_token(blocks, tokens, place, embedding, positions, cosine, sine, norm_weight, norm_bias,
               states, qkv, attended, hidden, state, launches);
  });
}
