// Blocks of a tile one after the other, and the room that work on one takes.
#pragma once
#include "runs.h"

namespace surgery {
namespace {

float scale_of(const Combine& job, int32_t parent, int64_t block) {
    return job.kinds[parent] == FP8_BLOCK ? job.scales[parent][block] : 1.0f;
}

// Calls visit(block, row, col, height, width) for each block in order.
template <typename Visit>
void for_blocks(const Combine& job, int64_t first, int64_t last, Visit visit) {
    const int64_t across = (job.cols + BLOCK - 1) / BLOCK;
    for (int64_t block = first; block < last; ++block) {
        const int64_t row = block / across * BLOCK, col = block % across * BLOCK;
        const int height = (int)(job.rows - row < BLOCK ? job.rows - row : BLOCK);
        const int width = (int)(job.cols - col < BLOCK ? job.cols - col : BLOCK);
        visit(block, row, col, height, width);
    }
}

template <int WIDTH>
inline __attribute__((always_inline)) void add_products(const float* left, const float* right,
                                                        double* __restrict lane, int width) {
    const int n = WIDTH ? WIDTH : width;
#pragma GCC ivdep
    for (int c = 0; c < n; ++c) lane[c] += (double)left[c] * (double)right[c];
}

struct Scratch {
    Array<double> lanes;
    Array<float> tile, terms, gaps;
    Array<uint8_t> stays;
    Stage stage;
    int64_t strip = -1;

    explicit Scratch(int32_t count, int64_t drawn = 0)
        : lanes((int64_t)BLOCK * (count * (count + 1) / 2 + 1)), tile((int64_t)BLOCK * BLOCK),
          terms((int64_t)BLOCK * count), gaps((int64_t)BLOCK * count), stays(drawn), stage(count) {}

    // Where a row's result is made: FP8 blocks are kept whole, others in turn, for in one place rows waited for one
    // another and TIES took twice its time.
    float* result(const Combine& job, int row) const {
        return tile.start + (job.out_kind == FP8_BLOCK ? row : row % 8) * BLOCK;
    }
};

}  // namespace
}  // namespace surgery
