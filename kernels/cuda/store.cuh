// Neighbours of a row on their way to memory, past the caches.
#pragma once
#include "e4m3.cuh"

namespace surgery {

// Whether a pointer is aligned to 16 bytes.
inline bool even(const void* pointer) { return ((uintptr_t)pointer & 15) == 0; }

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return (uint32_t)float_to_bf16(low) | (uint32_t)float_to_bf16(high) << 16;
#endif
}

// Values that fill 16 bytes.
template <int KIND>
constexpr int RUN_OF = KIND == FP8_BLOCK ? 16 : KIND == BF16 ? 8 : 4;

// `whole`: all COUNT of them have a place there, aligned to as many bytes as they take, 16 at most; else the first
// `count`.
template <int KIND, int COUNT>
__device__ __forceinline__ void store(void* into, int64_t at, int64_t count, bool whole, const float* from) {
    static_assert(COUNT % 4 == 0 && (KIND != BF16 || COUNT % 8 == 0), "no whole words");
    if (whole) {
#pragma unroll
        for (int i = 0; i < COUNT; i += RUN_OF<KIND>) {
            const float* f = from + i;
            if (KIND == F32)
                __stcs((float4*)((float*)into + at + i), make_float4(f[0], f[1], f[2], f[3]));
            else if (KIND == BF16)
                __stcs((uint4*)((uint16_t*)into + at + i),
                       make_uint4(pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3]), pack_bf16(f[4 % COUNT], f[5 % COUNT]),
                                  pack_bf16(f[6 % COUNT], f[7 % COUNT])));
            else if (COUNT == 4)
                __stcs((uint32_t*)((uint8_t*)into + at), pack4(f));
            else if (COUNT == 8)
                __stcs((uint2*)((uint8_t*)into + at), make_uint2(pack4(f), pack4(f + 4 % COUNT)));
            else
                __stcs((uint4*)((uint8_t*)into + at + i),
                       make_uint4(pack4(f), pack4(f + 4 % COUNT), pack4(f + 8 % COUNT), pack4(f + 12 % COUNT)));
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        if (i >= count) continue;
        if (KIND == FP8_BLOCK) ((uint8_t*)into)[at + i] = float_to_e4m3(from[i]);
        if (KIND == BF16) ((uint16_t*)into)[at + i] = float_to_bf16(from[i]);
        if (KIND == F32) ((float*)into)[at + i] = from[i];
    }
}

}  // namespace surgery
