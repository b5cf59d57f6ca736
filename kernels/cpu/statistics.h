// What methods ask of whole tensors: dot products, counts of magnitudes, divergences of rows.
#pragma once
#include "../core/merge.h"
#include "merge.h"
#include "tiles.h"

namespace surgery {
namespace {

template <int WIDTH>
void products_block(const Combine& job, int32_t offset, Scratch& scratch, int64_t block, int height,
                    int width, int64_t corner) {
    const int n = WIDTH ? WIDTH : width;
    const int32_t vectors = job.count - offset, pairs = vectors * (vectors + 1) / 2;
    double* lanes = scratch.lanes.start;
    memset(lanes, 0, sizeof(double) * BLOCK * pairs);
    scratch.stage.fill<WIDTH>(job, block, corner, height, width);
    for (int r = 0; r < height; ++r) {
        const float* base = scratch.stage.of(0, r);
        for (int32_t i = 1; offset && i < job.count; ++i) {
            float* gap = scratch.stage.of(i, r);
#pragma GCC ivdep
            for (int c = 0; c < n; ++c) gap[c] -= base[c];
        }
        double* lane = lanes;
        for (int32_t i = 0; i < vectors; ++i)
            for (int32_t j = 0; j <= i; ++j, lane += BLOCK)
                add_products<WIDTH>(scratch.stage.of(i + offset, r), scratch.stage.of(j + offset, r), lane, width);
    }
    for (int32_t k = 0; k < pairs; ++k) job.sums[block * pairs + k] = folded(lanes + k * BLOCK);
}

void products(const Combine* job, int32_t offset, int64_t first, int64_t last) {
    Scratch scratch(job->count);
    for_blocks(*job, first, last, [&](int64_t block, int64_t row, int64_t col, int height, int width) {
        const int64_t corner = row * job->cols + col;
        if (width == BLOCK)
            products_block<BLOCK>(*job, offset, scratch, block, height, width, corner);
        else
            products_block<0>(*job, offset, scratch, block, height, width, corner);
    });
}

// Few numbers have a wanted digit: eight that have none are passed over at once.
template <int WIDTH>
inline __attribute__((always_inline)) void count_lower(const int32_t* bits, int width, const int32_t* digits,
                                                       int32_t digit_count, int64_t* counts) {
    const int n = WIDTH ? WIDTH : width;
    alignas(64) uint8_t wanted[BLOCK] = {0};
    for (int32_t d = 0; d < digit_count; ++d) {
        const int32_t digit = digits[d];
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) wanted[c] |= (bits[c] >> 16) == digit;
    }
    for (int begin = 0; begin < n; begin += 8) {
        uint64_t any;
        memcpy(&any, wanted + begin, 8);
        if (!any) continue;
        for (int c = begin; c < begin + 8; ++c)
            for (int32_t d = 0; wanted[c] && d < digit_count; ++d)
                if (bits[c] >> 16 == digits[d]) ++counts[(int64_t)d * 65536 + (bits[c] & 0xFFFF)];
    }
}

template <int WIDTH>
void counting_block(const Counting& job, Stage& stage, int64_t block, int64_t row, int height, int width, int64_t corner) {
    const int n = WIDTH ? WIDTH : width;
    const Combine& at = job.at;
    alignas(64) int32_t bits[BLOCK];
    stage.fill<WIDTH>(at, block, corner, height, width);
    for (int r = 0; r < height; ++r) {
        const float weight = job.row_weights ? job.row_weights[row + r] : 1.0f;
        const float* base = stage.of(0, r);
        for (int32_t i = 1; i < at.count; ++i) {
            const float* size = stage.of(i, r);
#pragma GCC ivdep
            for (int c = 0; c < n; ++c)
                bits[c] = (int32_t)(bits_of((size[c] - base[c]) * weight) & 0x7FFFFFFFu);
            if (!job.digit_count) {
                int64_t* counts = job.counts + (i - 1) * 32768;
                for (int c = 0; c < n; ++c) ++counts[bits[c] >> 16];
                continue;
            }
            count_lower<WIDTH>(bits, width, job.digits + (i - 1) * job.digit_count, job.digit_count,
                               job.counts + (int64_t)(i - 1) * job.digit_count * 65536);
        }
    }
}

void counting(const Counting* job) {
    const Combine& at = job->at;
    const int64_t blocks = (at.rows + BLOCK - 1) / BLOCK * ((at.cols + BLOCK - 1) / BLOCK);
    Stage stage(at.count);
    for_blocks(at, 0, blocks, [&](int64_t block, int64_t row, int64_t col, int height, int width) {
        const int64_t corner = row * at.cols + col;
        if (width == BLOCK)
            counting_block<BLOCK>(*job, stage, block, row, height, width, corner);
        else
            counting_block<0>(*job, stage, block, row, height, width, corner);
    });
}

void load_row(const Combine& job, int32_t parent, int64_t row, float* to) {
    const int64_t across = (job.cols + BLOCK - 1) / BLOCK;
    for (int64_t b = 0; b < across; ++b) {
        const int64_t col = b * BLOCK;
        const float scale = scale_of(job, parent, row / BLOCK * across + b);
        const int width = (int)(job.cols - col < BLOCK ? job.cols - col : BLOCK);
        const int64_t place = row * job.cols + col;
        if (width == BLOCK)
            load_run<BLOCK>(job.parents[parent], job.kinds[parent], scale, place, width, to + col);
        else
            load_run<0>(job.parents[parent], job.kinds[parent], scale, place, width, to + col);
    }
}

// Powers of e of a row less its largest number, and the reciprocal of their sum.
double powers_of(const float* row, int64_t cols, double* __restrict powers) {
    float largest = row[0];
    for (int64_t c = 1; c < cols; ++c) largest = row[c] > largest ? row[c] : largest;
    alignas(64) double lanes[BLOCK] = {0.0};
    for (int64_t begin = 0; begin < cols; begin += BLOCK) {
        const int n = (int)(cols - begin < BLOCK ? cols - begin : BLOCK);
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) {
            powers[begin + c] = exp_of_negative((double)row[begin + c] - (double)largest);
            lanes[c] += powers[begin + c];
        }
    }
    return 1.0 / folded(lanes);
}

void divergence(const Combine* job, float* out, int64_t first, int64_t last) {
    const int64_t cols = job->cols;
    Array<float> row(cols);
    Array<double> base(cols), model(cols);
    for (int64_t r = first; r < last; ++r) {
        load_row(*job, 0, r, row.start);
        const double by_base = powers_of(row.start, cols, base.start);
        load_row(*job, 1, r, row.start);
        const double by_model = powers_of(row.start, cols, model.start);
        alignas(64) double lanes[BLOCK] = {0.0};
        for (int64_t begin = 0; begin < cols; begin += BLOCK) {
            const int n = (int)(cols - begin < BLOCK ? cols - begin : BLOCK);
            const double *qs = base.start + begin, *ps = model.start + begin;
#pragma GCC ivdep
            for (int c = 0; c < n; ++c) {
                const double p = ps[c] * by_model + 1e-8, q = qs[c] * by_base + 1e-8;
                lanes[c] += p * log_of_positive(p / q);
            }
        }
        const double sum = folded(lanes);
        out[r] = (float)(sum > 0.0 ? sum : 0.0);
    }
}

}  // namespace
}  // namespace surgery
