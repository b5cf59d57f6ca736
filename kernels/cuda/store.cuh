// Values on their way to memory: bf16 pairs, and runs of 4 or 8 values in 16-byte stores past the caches.
#pragma once
#include <cuda_runtime.h>

#include "../core/bits.h"

namespace surgery {

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return (uint32_t)float_to_bf16(low) | (uint32_t)float_to_bf16(high) << 16;
#endif
}

// Values of a run that fill 16 bytes.
template <int KIND>
constexpr int RUN_OF = KIND == BF16 ? 8 : 4;

// `whole`: all of a run lie there, aligned; else the first `count`.
template <int KIND>
__device__ __forceinline__ void store_run(void* into, int64_t at, int64_t count, bool whole, const float* v) {
    if (whole) {
        if (KIND == BF16)
            __stcs((uint4*)((uint16_t*)into + at),
                   make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4 % RUN_OF<KIND>], v[5 % RUN_OF<KIND>]),
                              pack_bf16(v[6 % RUN_OF<KIND>], v[7 % RUN_OF<KIND>])));
        else
            __stcs((float4*)((float*)into + at), make_float4(v[0], v[1], v[2], v[3]));
        return;
    }
#pragma unroll
    for (int i = 0; i < RUN_OF<KIND>; ++i)
        if (i < count) {
            if (KIND == BF16) ((uint16_t*)into)[at + i] = float_to_bf16(v[i]);
            else ((float*)into)[at + i] = v[i];
        }
}

}  // namespace surgery
