// Merge methods on tiles: statistics of whole tensors, and results in one pass.
#pragma once
#include "blocks.h"

enum Thinned { ALL = 0, NOTHING = 1, BETWEEN = 2, DRAWN = 3 };

// What stays of one model's difference from the base. DRAWN: entries whose number is below `density`,
// divided by it if `divide`; `states` holds an SFC64 state for each 128 rows.
struct Thin {
    int32_t kind, divide;
    float low, high, density, factor;
    const uint64_t* states;
};

// base + scale * sum of weights[i] * thinned difference i; parent 0 is the base and its weight unused.
// Sums, where wanted: |p0|^2, |d1|^2, ..., then d2 d1, d3 d1, d3 d2, ... of the whole differences d.
struct Tasks {
    Combine at;
    const Thin* thins;  // by parent, the base's unused
    int32_t elect, divide;
    float share, scale;  // share: what sums are divided by without an election; 1: nothing
    uint32_t* drawn;     // on CUDA, where any is DRAWN: a bit for each entry, every model from a new word on
};

// `sizes` gives sums of |difference i|, then of |thinned difference i|, by block: [blocks, 2 * (parents - 1)].

// base + (model - base) where |model - base| * weight[row] >= threshold.
struct Fusion {
    Combine at;
    const float* row_weights;
    float threshold;
};

// Counts of |parent i - parent 0| (times row_weights, where given) by its bits: the upper 16, or (digits)
// the lower 16 of numbers whose upper 16 are a digit.
struct Counting {
    Combine at;
    const float* row_weights;
    const int32_t* digits;  // [parents - 1, digit_count]
    int32_t digit_count;    // 0: upper bits
    int64_t* counts;        // [parents - 1, 32768] or [parents - 1, digit_count, 65536]
};

// Dot products of the parents, or (offset) of the differences of all but the first from it: the lower triangle.
struct Products {
    Combine at;
    int32_t offset;
};

// KL(softmax(parent 1) + 1e-8 | softmax(parent 0) + 1e-8) of each row, not below 0.
struct Divergence {
    Combine at;
    float* out;
};

struct MergeLoops {
    void (*tasks)(const Tasks*, int64_t, int64_t);
    void (*sizes)(const Tasks*, int64_t, int64_t);
    void (*fusion)(const Fusion*, int64_t, int64_t);
    void (*products)(const Products*, int64_t, int64_t);
    void (*counting)(const Counting*, int64_t, int64_t);
    void (*divergence)(const Divergence*, int64_t, int64_t);
};

extern "C" {
extern const MergeLoops surgery_merge_portable, surgery_merge_avx2, surgery_merge_avx512;
}
