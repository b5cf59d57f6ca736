// To packed forms of few bits: codes on grids that span groups, and nibbles of the nearest of 16 levels.
#pragma once
#include "sweep.h"

namespace surgery {

// The grid over each group of columns g = c / width (surgery/codecs/grid.py), and every code at its place in a
// little-endian stream over the row: code c takes the bits c * bits .. , which are 0 past the last.
struct ToStream {
    const void* values;  // [rows, cols]
    uint8_t* stream;     // [rows, row_bytes]
    float* scales;       // [rows, groups], rounded to scale_kind
    uint8_t* zeros;      // [rows, groups]
    int64_t rows, cols, row_bytes, groups, width;
    int32_t kind;        // of values: BF16 or F32
    int32_t scale_kind;  // BF16, F16 or F32
    int32_t bits;        // of a place in the stream, 2 to 8
    int32_t top;         // largest code
    int32_t symmetric;
};

// Blocks of the flattened values to codes of the nearest level, the first of two in the high nibble, as in
// surgery/codecs/nf4.py. A last odd code is followed by that of 0.
struct ToNibbles {
    const void* values;  // [count]
    uint8_t* bytes;      // [ceil(count / 2)]
    float* absmax;       // [ceil(count / block)]
    int64_t count, block;
    int32_t kind;       // of values: BF16 or F32
    float borders[15];  // between neighbours
};

// Integers in the order of floats, NaN of either sign outermost; its own inverse.
SURGERY_FN int32_t ordered(uint32_t bits) { return (int32_t)bits ^ (((int32_t)bits >> 31) & 0x7FFFFFFF); }

SURGERY_FN float stored_scale(float scale, int32_t kind) {
    return kind == F32 ? scale : kind == BF16 ? bf16_to_float(float_to_bf16(scale)) : rounded_to_fp16(scale);
}

struct GridOf {
    float scale;
    int32_t zero;
};

// Of a group from low (at most 0) to high (at least 0), both NaN where one of its values is.
SURGERY_FN GridOf span_grid(float low, float high, int32_t top, bool symmetric, int32_t kind) {
    const float span = symmetric ? 2.0f * (high > -low ? high : -low) : high - low;
    float scale = stored_scale(span / (float)top, kind);
    scale = scale == 0.0f ? 1.0f : scale;
    const int32_t zero = symmetric ? (top + 1) / 2 : grid_code(grid_offset(-low / scale, 0.0f, (float)top), 0.0f);
    return GridOf{scale, zero};
}

static const float SMALLEST_ABSMAX = 1e-38f;

// What whole blocks are multiplied by and a shorter one is divided by. NaN stays.
SURGERY_FN float raised(float absmax) { return absmax < SMALLEST_ABSMAX ? SMALLEST_ABSMAX : absmax; }

SURGERY_FN int32_t borders_below(float value, const float* borders) {
    int32_t found = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int i = 0; i < 15; ++i) found += value > borders[i] ? 1 : 0;
    return found;
}

}  // namespace surgery
