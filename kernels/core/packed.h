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

// AWQ's GEMM form, 4 bits: out[r, c] = (code[c, r] - zero[g, r]) * scale[g, r], g = c / width. Field j of a word
// holds row awq_row(j) of its eight.
struct AwqWords {
    const uint32_t* words;   // [cols, rows / 8]
    const uint32_t* zeros;   // [groups, rows / 8]
    const uint16_t* scales;  // fp16 [groups, rows]
    void* out;               // [rows, cols]
    int64_t rows, cols, groups, width;
    int32_t kind;
};

// 0, 2, 4, 6, 1, 3, 5, 7.
SURGERY_FN constexpr int awq_row(int field) { return field < 4 ? 2 * field : 2 * field - 7; }

SURGERY_FN float on_grid(uint32_t code, int32_t zero, float scale) { return (float)((int32_t)code - zero) * scale; }

}  // namespace surgery
