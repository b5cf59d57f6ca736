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

void products(const Products* job, int64_t first, int64_t last) {
    const Combine& at = job->at;
    Scratch scratch(at.count);
    for_blocks(at, first, last, [&](int64_t block, int64_t row, int64_t col, int height, int width) {
        const int64_t corner = row * at.cols + col;
        if (width == BLOCK)
            products_block<BLOCK>(at, job->offset, scratch, block, height, width, corner);
        else
            products_block<0>(at, job->offset, scratch, block, height, width, corner);
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

void counting(const Counting* job, int64_t first, int64_t last) {
    const Combine& at = job->at;
    Stage stage(at.count);
    for_blocks(at, first, last, [&](int64_t block, int64_t row, int64_t col, int height, int width) {
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

// Powers of e of a row less its largest number, and the reciprocal of their sum. NaN is the largest where there is one.
double powers_of(const float* row, int64_t cols, double* __restrict powers) {
    alignas(64) float most[BLOCK], least[BLOCK];
    int32_t broken = 0;
    for (int c = 0; c < BLOCK; ++c) most[c] = least[c] = row[0];
    for (int64_t begin = 0; begin < cols; begin += BLOCK) {
        const int n = (int)(cols - begin < BLOCK ? cols - begin : BLOCK);
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) {
            const float value = row[begin + c];
            most[c] = value > most[c] ? value : most[c];
            least[c] = value < least[c] ? value : least[c];
            broken |= value == value ? 0 : 1;
        }
    }
    for (int c = 1; c < BLOCK; ++c) {
        most[0] = most[c] > most[0] ? most[c] : most[0];
        least[0] = least[c] < least[0] ? least[c] : least[0];
    }
    const double largest = broken ? __builtin_nan("") : most[0];
    const bool small = least[0] - largest >= SMALL;
    alignas(64) double lanes[BLOCK] = {0.0};
    for (int64_t begin = 0; begin < cols; begin += BLOCK) {
        const int n = (int)(cols - begin < BLOCK ? cols - begin : BLOCK);
        const float* from = row + begin;
        double* __restrict to = powers + begin;
        if (small) {
#pragma GCC ivdep
            for (int c = 0; c < n; ++c) lanes[c] += to[c] = exp_series((double)from[c] - largest);
        } else {
#pragma GCC ivdep
            for (int c = 0; c < n; ++c) lanes[c] += to[c] = exp_of_negative((double)from[c] - largest);
        }
    }
    return 1.0 / folded(lanes);
}

void divergence(const Divergence* job, int64_t first, int64_t last) {
    const int64_t cols = job->at.cols;
    Array<float> row(cols);
    Array<double> base(cols), model(cols);
    alignas(64) double lanes[BLOCK], ps[BLOCK], qs[BLOCK], shares[BLOCK];
    for (int64_t r = first; r < last; ++r) {
        load_row(job->at, 0, r, row.start);
        const double by_base = powers_of(row.start, cols, base.start);
        load_row(job->at, 1, r, row.start);
        const double by_model = powers_of(row.start, cols, model.start);
        memset(lanes, 0, sizeof lanes);
        for (int64_t begin = 0; begin < cols; begin += BLOCK) {
            const int n = (int)(cols - begin < BLOCK ? cols - begin : BLOCK);
            int64_t far = 0;
#pragma GCC ivdep
            for (int c = 0; c < n; ++c) {
                ps[c] = model.start[begin + c] * by_model + 1e-8, qs[c] = base.start[begin + c] * by_base + 1e-8;
                const double gap = ps[c] - qs[c], sum = ps[c] + qs[c];
                shares[c] = gap / sum;
                far |= near_one(gap, sum) ? 0 : 1;
            }
            if (!far) {
#pragma GCC ivdep
                for (int c = 0; c < n; ++c) lanes[c] += ps[c] * log_series(shares[c]);
            } else {
#pragma GCC ivdep
                for (int c = 0; c < n; ++c) {
                    const double near = log_series(shares[c]), other = log_of_positive(ps[c] / qs[c]);
                    lanes[c] += ps[c] * (near_one(ps[c] - qs[c], ps[c] + qs[c]) ? near : other);
                }
            }
        }
        const double sum = folded(lanes);
        job->out[r] = (float)(sum > 0.0 ? sum : 0.0);
    }
}

}  // namespace
}  // namespace surgery
