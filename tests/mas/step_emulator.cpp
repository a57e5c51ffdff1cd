/* mas/step.cu for a CPU; see step_emulator.h. */
#include "step_emulator.h"

#include "../../mas/step.cu"

extern "C" void emulate(const Block *blocks, const long long *tokens, long long *place,
                        const u16 *embedding, const u16 *positions, const u16 *cosine,
                        const u16 *sine, const u16 *norm_weight, const u16 *norm_bias,
                        u32 *scratch, u16 *state, u32 *counts) {
  run_programs(PROGRAMS, THREADS, SHARED_BYTES, [&] {
    read_token(blocks, tokens, place, embedding, positions, cosine, sine, norm_weight, norm_bias,
               scratch, state, counts);
  });
}
