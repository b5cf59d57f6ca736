// What every other file stands on: bit casts, and functions for g++ and nvcc alike.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define SURGERY_FN static __host__ __device__ __forceinline__
#define SURGERY_MEMBER __host__ __device__ __forceinline__
#else
#define SURGERY_FN static inline __attribute__((always_inline))
#define SURGERY_MEMBER inline __attribute__((always_inline))
#endif

namespace surgery {

enum Kind { FP8_BLOCK = 0, BF16 = 1, F32 = 2, F16 = 3 };

SURGERY_FN uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

SURGERY_FN float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Magnitude bits of a finite value; 0 for NaN and infinity, which take no part in a block's scale.
SURGERY_FN int32_t finite_magnitude(float value) {
    int32_t magnitude = (int32_t)(bits_of(value) & 0x7FFFFFFFu);
    return magnitude < 0x7F800000 ? magnitude : 0;
}

SURGERY_FN float bf16_to_float(uint16_t stored) { return float_of((uint32_t)stored << 16); }

// To nearest, ties to even; every NaN becomes 0x7FC0.
SURGERY_FN uint16_t float_to_bf16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// Subnormals are multiples of 2^-24; the others move into the float's fields.
SURGERY_FN float fp16_to_float(uint16_t stored) {
    const uint32_t magnitude = stored & 0x7FFFu;
    uint32_t bits = (magnitude << 13) + 0x38000000u;
    if (magnitude >= 0x7C00u) bits = magnitude << 13 | 0x7F800000u;
    if (magnitude < 0x400u) bits = bits_of((float)(int32_t)magnitude * 5.9604644775390625e-8f);
    return float_of(bits | (uint32_t)(stored & 0x8000u) << 16);
}

// The nearest fp16 value, ties to even. Adding 1/2 leaves multiples of 2^-24, what fp16 has below 2^-14.
SURGERY_FN float rounded_to_fp16(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
    uint32_t rounded = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u)) & ~0x1FFFu;
    if (rounded >= 0x47800000u) rounded = 0x7F800000u;
    if (magnitude < 0x38800000u) rounded = bits_of((float_of(magnitude) + 0.5f) - 0.5f);
    if (magnitude > 0x7F800000u) rounded = 0x7FC00000u;
    return float_of(rounded | (bits & 0x80000000u));
}

}  // namespace surgery
