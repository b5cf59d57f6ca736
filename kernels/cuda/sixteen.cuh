// 16 neighbours of a row on their way to memory.
#pragma once
#include "e4m3.cuh"
#include "store.cuh"

namespace surgery {

constexpr int RUN = 16;

// `whole`: all of them lie there, aligned to 16 bytes; else the first `count`.
template <int KIND>
__device__ __forceinline__ void store(void* into, int64_t at, int count, bool whole, const float* from) {
    if (whole) {
        if (KIND == FP8_BLOCK) {
            __stcs((uint4*)((uint8_t*)into + at),
                   make_uint4(pack4(from), pack4(from + 4), pack4(from + 8), pack4(from + 12)));
        } else if (KIND == BF16) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float* f = from + 8 * half;
                __stcs((uint4*)((uint16_t*)into + at) + half,
                       make_uint4(pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3]), pack_bf16(f[4], f[5]),
                                  pack_bf16(f[6], f[7])));
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                __stcs((float4*)((float*)into + at) + i,
                       make_float4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]));
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
        if (i < count) {
            if (KIND == FP8_BLOCK) ((uint8_t*)into)[at + i] = float_to_e4m3(from[i]);
            if (KIND == BF16) ((uint16_t*)into)[at + i] = float_to_bf16(from[i]);
            if (KIND == F32) ((float*)into)[at + i] = from[i];
        }
    }
}

// Whether a pointer is aligned to that.
inline bool even(const void* pointer) { return ((uintptr_t)pointer & 15) == 0; }

}  // namespace surgery
