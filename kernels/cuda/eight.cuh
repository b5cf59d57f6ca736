// Eight neighbours on their way from memory, and maxima in which NaN wins.
#pragma once
#include <cuda_runtime.h>

#include "../core/bits.h"

namespace surgery {

constexpr int OCTET = 8;
constexpr unsigned ALL = ~0u;

// NaN where either is.
__device__ __forceinline__ float larger(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float found;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(found) : "f"(a), "f"(b));
    return found;
#else
    return a != a ? a : b != b ? b : fmaxf(a, b);
#endif
}

template <int KIND>
__device__ __forceinline__ float one_value(const void* from, int64_t at) {
    return KIND == BF16 ? bf16_to_float(((const uint16_t*)from)[at]) : ((const float*)from)[at];
}

// As they are stored, in registers: loads of several are under way before the first is used.
template <int KIND>
struct Eight {
    static constexpr int WORDS = KIND == BF16 ? 4 : 8;
    uint32_t words[WORDS];

    // `aligned`: to 16 bytes. Of fewer than eight, the first `count` lie there, and zeros follow. `again`: they will
    // be read once more, and should stay in the L2.
    __device__ __forceinline__ void load(const void* from, int64_t at, int64_t count, bool aligned, bool again = false) {
        if (count >= OCTET && aligned) {
#pragma unroll
            for (int i = 0; i < WORDS / 4; ++i) {
                const uint4* place = (const uint4*)((const uint32_t*)from + (KIND == BF16 ? at / 2 : at)) + i;
                const uint4 four = again ? __ldg(place) : __ldcs(place);
                words[4 * i] = four.x, words[4 * i + 1] = four.y;
                words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = 0;
#pragma unroll
        for (int i = 0; i < OCTET; ++i) {
            if (i >= count) continue;
            if (KIND == BF16) words[i / 2 % WORDS] |= (uint32_t)((const uint16_t*)from)[at + i] << 16 * (i % 2);
            else words[i % WORDS] = ((const uint32_t*)from)[at + i];
        }
    }

    __device__ __forceinline__ void values(float* to) const {
#pragma unroll
        for (int i = 0; i < OCTET; ++i) {
            if (KIND == BF16) to[i] = float_of(i % 2 ? words[i / 2 % WORDS] & 0xFFFF0000u : words[i / 2 % WORDS] << 16);
            else to[i] = float_of(words[i % WORDS]);
        }
    }
};

}  // namespace surgery
