// Eight neighbours on their way from memory, and maxima in which NaN wins.
#pragma once
#include "raw.cuh"

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

template <int KIND>
using Eight = Raw<KIND, OCTET>;

}  // namespace surgery
