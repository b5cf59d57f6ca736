// Packed forms of few bits: bit streams of whole-number codes on a grid, and nibbles that name one of 16 levels.
#pragma once
#include "bits.h"

namespace surgery {

// out[r, c] = (code[r, c] - zero[r, g]) * scale[r, g], g = c / width. Code c of a row takes the bits
// c * bits .. of a little-endian stream over the row's words.
struct Stream {
    const uint32_t* words;  // [rows, row_words]
    const float* scales;    // [rows, groups]
    const uint8_t* zeros;   // [rows, groups]; null: `zero` everywhere
    void* out;              // [rows, cols]
    int64_t rows, cols, row_words, groups, width;
    int32_t kind;  // of out: BF16 or F32
    int32_t bits;  // 2 to 8
    int32_t zero;
};

// out[i] = level[code[i]] * scale[i / block]; two codes a byte.
struct Nibbles {
    const uint8_t* bytes;
    const float* scales;
    const float* levels;  // [16]
    void* out;
    int64_t count, block;
    int32_t kind;
    int32_t high_first;  // else the first code is the low nibble
};

SURGERY_FN float on_grid(uint32_t code, int32_t zero, float scale) { return (float)((int32_t)code - zero) * scale; }

}  // namespace surgery
