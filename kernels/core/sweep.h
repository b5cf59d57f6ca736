// One block of columns in optimal brain surgery (surgery/codecs/column_sweep.py): what a sweep works on, and the
// arithmetic of one column.
#pragma once
#include "bits.h"

namespace surgery {

static const int MOST_COLS = 128;   // of a block
static const int MOST_PATTERN = 16;  // m of n:m

// Strides are in elements; the last dimension of every operand is contiguous.
struct Sweep {
    const float* weights;  // [batch, rows, cols]
    int64_t weight_batch, weight_row;
    const float* factor;  // [batch, cols, cols], upper
    int64_t factor_batch, factor_row;
    const uint8_t* mask;  // [batch, rows, cols], 1: pruned; null: none
    int64_t mask_batch, mask_row;
    const float* scales;  // [batch, rows, groups], contiguous as zeros are; null: no grid
    const uint8_t* zeros;
    const int32_t* group;  // [batch, cols]
    int64_t group_batch;
    float* values;  // [batch, rows, cols]; may be the weights themselves
    int64_t value_batch, value_row;
    float* errors;  // [batch, rows, cols]
    int64_t error_batch, error_row;
    uint8_t* codes;  // [batch, rows, cols]; null without a grid
    int64_t code_batch, code_row;
    int64_t batch, rows, groups;
    int32_t cols;
    int32_t prune, of;  // n and m of a pattern, 0: none
    int32_t top;
};

// round(quotient) clamped to low .. high, which are whole numbers within +-255: the code less the zero point.
// Clamping first gives the same, as rounding is monotonous, and lets one addition round: what is left of the
// sum with 1.5 * 2^23 has no fraction. Never -0; NaN stays NaN.
SURGERY_FN float grid_offset(float quotient, float low, float high) {
    float clamped = quotient < low ? low : quotient;
    clamped = clamped > high ? high : clamped;
    return (clamped + 12582912.0f) - 12582912.0f;
}

// The code at an offset from the zero point, which is -low; 0 where it is NaN.
SURGERY_FN uint8_t grid_code(float offset, float low) {
    const float code = offset - low;
    return (uint8_t)(int32_t)(code == code ? code : 0.0f);
}

// Orders as (w / U)^2 does, every NaN after the numbers and equal to the others.
SURGERY_FN uint32_t saliency_key(float ratio) {
    const float squared = ratio * ratio;
    return squared != squared ? 0x7FC00000u : bits_of(squared);
}

}  // namespace surgery
