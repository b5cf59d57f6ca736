// See merge.h. The same written rule as blocks.cpp: every operation rounded by itself, sums in float64
// down the columns of a block, then halves onto halves.
#include "merge.h"

#include "statistics.h"
#include "thinning.h"

using namespace surgery;

namespace {

template <int WIDTH>
void tasks_block(const Tasks& job, Scratch& scratch, int64_t block, int64_t col, int height, int width,
                 int64_t corner) {
    const int n = WIDTH ? WIDTH : width;
    const Combine& at = job.at;
    const int32_t count = at.count, columns = count + (count - 1) * (count - 2) / 2;
    const float scale = job.scale;
    double* lanes = scratch.lanes.start;
    float* gaps = scratch.gaps.start;
    float* terms = scratch.terms.start;
    int32_t amax = 0;
    memset(lanes, 0, sizeof(double) * BLOCK * columns);
    scratch.stage.fill<WIDTH>(at, block, corner, height, width);
    for (int r = 0; r < height; ++r) {
        const int64_t place = corner + r * at.cols;
        const float* base = scratch.stage.of(0, r);
        for (int32_t i = 1; i < count; ++i) {
            float* __restrict gap = gaps + (i - 1) * BLOCK;
            const float* value = scratch.stage.of(i, r);
#pragma GCC ivdep
            for (int c = 0; c < n; ++c) gap[c] = value[c] - base[c];
        }
        if (at.sums) {
            add_products<WIDTH>(base, base, lanes, width);
            double* lane = lanes + count * BLOCK;
            for (int32_t i = 0; i < count - 1; ++i) {
                const float* gap = gaps + i * BLOCK;
                add_products<WIDTH>(gap, gap, lanes + (i + 1) * BLOCK, width);
                for (int32_t j = 0; j < i; ++j, lane += BLOCK)
                    add_products<WIDTH>(gap, gaps + j * BLOCK, lane, width);
            }
        }
        if (!at.out) continue;
        for (int32_t i = 1; i < count; ++i) {
            float* __restrict term = terms + (i - 1) * BLOCK;
            memcpy(term, gaps + (i - 1) * BLOCK, sizeof(float) * n);
            const uint8_t* stays = scratch.stays.start;
            if (job.thins[i].kind == DRAWN) stays += ((int64_t)i * BLOCK + r) * at.cols + col;
            thin_run<WIDTH>(job.thins[i], stays, width, term);
            const float weight = at.weights[i];
#pragma GCC ivdep
            for (int c = 0; c < n; ++c) term[c] *= weight;
        }
        float* __restrict total = scratch.result(at, r);
        bring_together<WIDTH>(job, terms, width, total);
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) total[c] = total[c] * scale + base[c];
        keep_run<WIDTH>(at, total, place, width, &amax);
    }
    if (at.out && at.out_kind == FP8_BLOCK)
        encode_block<WIDTH>(at, block, height, width, corner, scratch.tile.start, amax);
    if (at.sums)
        for (int32_t i = 0; i < columns; ++i) at.sums[block * columns + i] = folded(lanes + i * BLOCK);
}

// Calls visit as for_blocks does, once the numbers of the block's rows are drawn.
template <typename Visit>
void for_drawn_blocks(const Tasks* job, int64_t first, int64_t last, Visit visit) {
    const Combine& at = job->at;
    bool drawn = false;
    for (int32_t i = 1; i < at.count; ++i) drawn |= job->thins[i].kind == DRAWN;
    Scratch scratch(at.count, drawn ? (int64_t)at.count * BLOCK * at.cols : 0);
    for_blocks(at, first, last, [&](int64_t block, int64_t row, int64_t col, int height, int width) {
        if (drawn && scratch.strip != row) {
            for (int32_t i = 1; i < at.count; ++i)
                if (job->thins[i].kind == DRAWN)
                    draw(job->thins[i].states + row / BLOCK * 4, job->thins[i].density,
                         (int64_t)height * at.cols, scratch.stays.start + (int64_t)i * BLOCK * at.cols);
            scratch.strip = row;
        }
        visit(scratch, block, col, height, width, row * at.cols + col);
    });
}

void tasks(const Tasks* job, int64_t first, int64_t last) {
    for_drawn_blocks(job, first, last,
                     [&](Scratch& scratch, int64_t block, int64_t col, int height, int width, int64_t corner) {
                         if (width == BLOCK)
                             tasks_block<BLOCK>(*job, scratch, block, col, height, width, corner);
                         else
                             tasks_block<0>(*job, scratch, block, col, height, width, corner);
                     });
}

template <int WIDTH>
inline __attribute__((always_inline)) void add_sizes(const float* values, double* __restrict lane, int width) {
    const int n = WIDTH ? WIDTH : width;
#pragma GCC ivdep
    for (int c = 0; c < n; ++c) lane[c] += (double)__builtin_fabsf(values[c]);
}

template <int WIDTH>
void sizes_block(const Tasks& job, Scratch& scratch, int64_t block, int64_t col, int height, int width,
                 int64_t corner) {
    const int n = WIDTH ? WIDTH : width;
    const Combine& at = job.at;
    const int32_t models = at.count - 1;
    double* lanes = scratch.lanes.start;
    memset(lanes, 0, sizeof(double) * BLOCK * 2 * models);
    scratch.stage.fill<WIDTH>(at, block, corner, height, width);
    for (int r = 0; r < height; ++r) {
        const float* base = scratch.stage.of(0, r);
        for (int32_t i = 1; i < at.count; ++i) {
            float* gap = scratch.stage.of(i, r);
#pragma GCC ivdep
            for (int c = 0; c < n; ++c) gap[c] -= base[c];
            add_sizes<WIDTH>(gap, lanes + (i - 1) * BLOCK, width);
            const uint8_t* stays = scratch.stays.start;
            if (job.thins[i].kind == DRAWN) stays += ((int64_t)i * BLOCK + r) * at.cols + col;
            thin_run<WIDTH>(job.thins[i], stays, width, gap);
            add_sizes<WIDTH>(gap, lanes + (models + i - 1) * BLOCK, width);
        }
    }
    for (int32_t k = 0; k < 2 * models; ++k) at.sums[block * 2 * models + k] = folded(lanes + k * BLOCK);
}

void sizes(const Tasks* job, int64_t first, int64_t last) {
    for_drawn_blocks(job, first, last,
                     [&](Scratch& scratch, int64_t block, int64_t col, int height, int width, int64_t corner) {
                         if (width == BLOCK)
                             sizes_block<BLOCK>(*job, scratch, block, col, height, width, corner);
                         else
                             sizes_block<0>(*job, scratch, block, col, height, width, corner);
                     });
}

template <int WIDTH>
void fusion_block(const Fusion& job, Scratch& scratch, int64_t block, int64_t row, int height, int width,
                  int64_t corner) {
    const int n = WIDTH ? WIDTH : width;
    const Combine& at = job.at;
    const float threshold = job.threshold;
    double* lanes = scratch.lanes.start;
    int32_t amax = 0;
    memset(lanes, 0, sizeof(double) * BLOCK * 2);
    scratch.stage.fill<WIDTH>(at, block, corner, height, width);
    for (int r = 0; r < height; ++r) {
        const int64_t place = corner + r * at.cols;
        const float weight = job.row_weights[row + r];
        float* __restrict total = scratch.result(at, r);
        const float* base = scratch.stage.of(0, r);
        float* model = scratch.stage.of(1, r);
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) model[c] -= base[c];
        if (at.sums) {
            add_products<WIDTH>(base, base, lanes, width);
            add_products<WIDTH>(model, model, lanes + BLOCK, width);
        }
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) {
            const float kept = __builtin_fabsf(model[c]) * weight >= threshold ? 1.0f : 0.0f;
            total[c] = model[c] * kept + base[c];
        }
        keep_run<WIDTH>(at, total, place, width, &amax);
    }
    if (at.out_kind == FP8_BLOCK)
        encode_block<WIDTH>(at, block, height, width, corner, scratch.tile.start, amax);
    if (at.sums)
        for (int32_t i = 0; i < 2; ++i) at.sums[block * 2 + i] = folded(lanes + i * BLOCK);
}

void fusion(const Fusion* job, int64_t first, int64_t last) {
    Scratch scratch(2);
    for_blocks(job->at, first, last, [&](int64_t block, int64_t row, int64_t col, int height, int width) {
        const int64_t corner = row * job->at.cols + col;
        if (width == BLOCK)
            fusion_block<BLOCK>(*job, scratch, block, row, height, width, corner);
        else
            fusion_block<0>(*job, scratch, block, row, height, width, corner);
    });
}

}  // namespace

extern "C" {
extern const MergeLoops SURGERY_MERGE = {tasks, sizes, fusion, products, counting, divergence};
}
