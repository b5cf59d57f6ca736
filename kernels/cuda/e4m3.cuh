// e4m3 in fours, and the quotients that become codes.
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../core/e4m3.h"

namespace surgery {

__device__ __forceinline__ void unpack4(uint32_t word, float* to) {
#if __CUDA_ARCH__ >= 890
    uint32_t low, high;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(low) : "h"((uint16_t)word));
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(high) : "h"((uint16_t)(word >> 16)));
    const float2 a = __half22float2(*reinterpret_cast<__half2*>(&low));
    const float2 b = __half22float2(*reinterpret_cast<__half2*>(&high));
    to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = e4m3_to_float((uint8_t)(word >> 8 * i));
#endif
}

__device__ __forceinline__ uint32_t pack4(const float* from) {
#if __CUDA_ARCH__ >= 890
    uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(from[1]), "f"(from[0]));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(from[3]), "f"(from[2]));
    return (uint32_t)low | (uint32_t)high << 16;
#else
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) word |= (uint32_t)float_to_e4m3(from[i]) << 8 * i;
    return word;
#endif
}

// 1 / scale as high + low, high below it and low above 0, for scales of 2^-60 to 2^60. value * low and one fused
// multiply-add give a quotient with the code of the IEEE quotient: its sign, zeros and NaN included, infinity saturating.
// Codes can only differ where one of the two lies on a boundary of codes and the other does not. Boundaries have 16
// mantissas; all 24-bit scales were tried with the values whose quotients lie next to them, and one scale needs the
// lower neighbour of its `low`.
struct Reciprocal {
    float high, low;

    __device__ __forceinline__ explicit Reciprocal(float scale) {
        float near;  // correctly rounded, once corrected
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(scale));
        near = __fmaf_rn(__fmaf_rn(-near, scale, 1.0f), near, near);
        high = __fmaf_rn(-near, scale, 1.0f) > 0.0f ? near : float_of(bits_of(near) - 1);
        const uint32_t bits = bits_of(__fmul_rz(__fmaf_rn(-high, scale, 1.0f), near));
        low = float_of((bits_of(scale) & 0x7FFFFFu) == 0x3FFFFFu ? bits - 1 : bits);
    }

    __device__ __forceinline__ float times(float value) const {
        return __fmaf_rn(value, high, __fmul_rn(value, low));
    }
};

}  // namespace surgery
