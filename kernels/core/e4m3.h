// e4m3 (no infinities, NaN is 0x7F) and the scale of an FP8 block.
#pragma once
#include "bits.h"

namespace surgery {

static const int BLOCK = 128;

// Subnormal codes are multiples of 2^-9; the others move into the float's fields. No float32 subnormal
// comes up, which some processors handle a hundred times slower, and no comparison, which g++ would do in
// 8 bits and then not vectorise.
SURGERY_FN float e4m3_to_float(uint8_t code) {
    int32_t magnitude = code & 0x7F;
    int32_t small = (magnitude - 8) >> 31, nan = (126 - magnitude) >> 31;
    int32_t normal = (magnitude << 20) + 0x3C000000;
    int32_t subnormal = (int32_t)bits_of((float)magnitude * 0.001953125f);
    int32_t value = (subnormal & small) | (normal & ~small) | (0x7FC00000 & nan);
    return float_of((uint32_t)value | ((uint32_t)(code & 0x80) << 24));
}

// To nearest, ties to even, saturating at 448; every NaN becomes 0x7F.
SURGERY_FN uint8_t float_to_e4m3(float value) {
    uint32_t bits = bits_of(value);
    uint32_t magnitude = bits & 0x7FFFFFFFu;
    uint32_t kept = magnitude < 0x43E00000u ? magnitude : 0x43E00000u;
    uint32_t normal = ((kept + 0x7FFFFu + ((kept >> 20) & 1u)) >> 20) - 960u;
    // Adding 2^14 leaves multiples of 2^-9 in the mantissa, rounded by the adder.
    uint32_t subnormal = bits_of(float_of(kept) + 16384.0f) - 0x46800000u;
    uint32_t code = kept < 0x3C800000u ? subnormal : normal;
    code |= (bits >> 24) & 0x80u;
    return (uint8_t)(magnitude > 0x7F800000u ? 0x7Fu : code);
}

// amax / 448, up to a power of two for ue8m0; 1 for a block of zeros.
SURGERY_FN float block_scale(float amax, bool ue8m0) {
    float scale = amax / 448.0f;
    if (ue8m0) scale = float_of((bits_of(scale) + 0x7FFFFFu) >> 23 << 23);
    return scale > 0.0f ? scale : 1.0f;
}

}  // namespace surgery
