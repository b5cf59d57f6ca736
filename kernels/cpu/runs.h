// Runs of at most 128 weights in one row of a block: from any stored form to float32, and back.
#pragma once
#include <stdlib.h>

#include "../core/e4m3.h"
#include "blocks.h"

// Unnamed: each instruction set has its own, and the linker must not take one for another.
namespace surgery {
namespace {

// In place of std::vector, whose functions the linker would share between instruction sets, and on whole cache lines:
// vectors that straddle two took a pass twice its time.
template <typename T>
struct Array {
    T* const start;
    explicit Array(int64_t count)
        : start(count ? (T*)aligned_alloc(64, ((size_t)count * sizeof(T) + 63) / 64 * 64) : nullptr) {}
    Array(const Array&) = delete;
    ~Array() { free(start); }
};

template <int WIDTH>
inline __attribute__((always_inline)) void load_run(const void* parent, int32_t kind, float scale, int64_t at,
                                                    int width, float* __restrict to) {
    const int n = WIDTH ? WIDTH : width;
    if (kind == FP8_BLOCK) {
        const uint8_t* from = (const uint8_t*)parent + at;
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) to[c] = e4m3_to_float(from[c]) * scale;
    } else if (kind == BF16) {
        const uint16_t* from = (const uint16_t*)parent + at;
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) to[c] = bf16_to_float(from[c]);
    } else {
        const float* from = (const float*)parent + at;
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) to[c] = from[c];
    }
}

// A block of each parent in float32, a row every 128. One parent is read after the other: rows of several in turn were
// up to eight times slower.
struct Stage {
    Array<float> rows;

    explicit Stage(int32_t parents) : rows((int64_t)parents * BLOCK * BLOCK) {}

    float* of(int32_t parent, int row) const { return rows.start + ((int64_t)parent * BLOCK + row) * BLOCK; }

    template <int WIDTH>
    void fill(const Combine& job, int64_t block, int64_t corner, int height, int width) {
        for (int32_t i = 0; i < job.count; ++i) {
            const float scale = job.kinds[i] == FP8_BLOCK ? job.scales[i][block] : 1.0f;
            for (int r = 0; r < height; ++r)
                load_run<WIDTH>(job.parents[i], job.kinds[i], scale, corner + r * job.cols, width, of(i, r));
        }
    }
};

// What becomes of a finished run: stored, or (FP8) kept in the tile while its magnitude is noted.
template <int WIDTH>
inline __attribute__((always_inline)) void keep_run(const Combine& job, const float* __restrict total,
                                                    int64_t at, int width, int32_t* amax) {
    const int n = WIDTH ? WIDTH : width;
    if (job.out_kind == FP8_BLOCK) {
        int32_t largest = *amax;
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) {
            const int32_t magnitude = finite_magnitude(total[c]);
            largest = magnitude > largest ? magnitude : largest;
        }
        *amax = largest;
    } else if (job.out_kind == BF16) {
        uint16_t* __restrict to = (uint16_t*)job.out + at;
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) to[c] = float_to_bf16(total[c]);
    } else {
        memcpy((float*)job.out + at, total, sizeof(float) * n);
    }
}

// Codes and scale of a block whose values are in `tile`, a row every 128.
template <int WIDTH>
inline void encode_block(const Combine& job, int64_t block, int height, int width, int64_t corner,
                         const float* tile, int32_t amax) {
    const int n = WIDTH ? WIDTH : width;
    const float scale = block_scale(float_of((uint32_t)amax), job.ue8m0);
    job.out_scales[block] = scale;
    for (int r = 0; r < height; ++r) {
        uint8_t* __restrict to = (uint8_t*)job.out + corner + r * job.cols;
        const float* from = tile + r * BLOCK;
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) to[c] = float_to_e4m3(from[c] / scale);
    }
}

// The sum of 128 lanes, halves onto halves; the lanes are used up.
inline double folded(double* lane) {
    for (int half = BLOCK / 2; half; half /= 2)
        for (int c = 0; c < half; ++c) lane[c] += lane[c + half];
    return lane[0];
}

}  // namespace
}  // namespace surgery
