// See blocks.h. Built with -ffp-contract=off: every product and sum is rounded by itself. The squares
// are exact in float64 (24 + 24 bits), so that their sums depend on the order alone: down each
// column of a block, then halves onto halves.
#include "runs.h"

using namespace surgery;

namespace {

const int SPAN = 4;  // runs of a row that all parents are added to before they are stored

template <int WIDTH>
inline __attribute__((always_inline)) void decode_run(const uint8_t* codes, float scale, void* out,
                                                      int32_t kind, int64_t at, int width) {
    const int n = WIDTH ? WIDTH : width;
    if (kind == BF16) {
        uint16_t* __restrict to = (uint16_t*)out + at;
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) to[c] = float_to_bf16(e4m3_to_float(codes[c]) * scale);
    } else {
        float* __restrict to = (float*)out + at;
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) to[c] = e4m3_to_float(codes[c]) * scale;
    }
}

void decode(const uint8_t* codes, const float* scales, void* out, int32_t kind, int64_t cols, int64_t first,
            int64_t last) {
    const int64_t across = (cols + BLOCK - 1) / BLOCK;
    for (int64_t row = first; row < last; ++row) {
        for (int64_t b = 0; b < across; ++b) {
            const int64_t at = row * cols + b * BLOCK;
            const float scale = scales[row / BLOCK * across + b];
            const int64_t left = cols - b * BLOCK;
            if (left >= BLOCK)
                decode_run<BLOCK>(codes + at, scale, out, kind, at, BLOCK);
            else
                decode_run<0>(codes + at, scale, out, kind, at, (int)left);
        }
    }
}

// total = value * weight, or more of it.
template <int WIDTH>
inline __attribute__((always_inline)) void add_run(const float* __restrict value, float weight, bool begun, int width,
                                                   float* __restrict total) {
    const int n = WIDTH ? WIDTH : width;
    if (begun)
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) total[c] += value[c] * weight;
    else
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) total[c] = value[c] * weight;
}

template <int WIDTH>
void combine_block(const Combine& job, int64_t block, int height, int width, int64_t corner, double* lanes,
                   float* tile, Stage& stage) {
    const int n = WIDTH ? WIDTH : width;
    int32_t amax = 0;
    if (job.sums) memset(lanes, 0, sizeof(double) * BLOCK * job.count);
    stage.fill<WIDTH>(job, block, corner, height, width);
    for (int r = 0; r < height; ++r) {
        const int64_t at = corner + r * job.cols;
        float* __restrict total = tile + (job.out_kind == FP8_BLOCK ? r * BLOCK : 0);
        bool begun = false;
        for (int32_t i = 0; i < job.count; ++i) {
            const float weight = job.weights[i];
            if (!job.sums && weight == 0.0f) continue;
            const float* value = stage.of(i, r);
            const float* base = stage.of(0, r);
            if (job.sums) {
                double* __restrict lane = lanes + i * BLOCK;
                if (i)
#pragma GCC ivdep
                    for (int c = 0; c < n; ++c) {
                        const double gap = (double)(base[c] - value[c]);
                        lane[c] += gap * gap;
                    }
                else
#pragma GCC ivdep
                    for (int c = 0; c < n; ++c) lane[c] += (double)base[c] * (double)base[c];
            }
            if (weight == 0.0f || !job.out) continue;
            add_run<WIDTH>(value, weight, begun, width, total);
            begun = true;
        }
        if (!job.out) continue;
        keep_run<WIDTH>(job, total, at, width, &amax);
    }
    if (job.out && job.out_kind == FP8_BLOCK) encode_block<WIDTH>(job, block, height, width, corner, tile, amax);
    if (job.sums) {
        for (int32_t i = 0; i < job.count; ++i) job.sums[block * job.count + i] = folded(lanes + i * BLOCK);
    }
}

// Where nothing needs whole blocks.
void combine_row(const Combine& job, int64_t row, float* tile) {
    const int64_t across = (job.cols + BLOCK - 1) / BLOCK;
    for (int64_t from = 0; from < across; from += SPAN) {
        const int64_t to = from + SPAN < across ? from + SPAN : across;
        bool begun = false;
        for (int32_t i = 0; i < job.count; ++i) {
            if (job.weights[i] == 0.0f) continue;
            const float* scales = job.kinds[i] == FP8_BLOCK ? job.scales[i] + row / BLOCK * across : nullptr;
            for (int64_t b = from; b < to; ++b) {
                const int64_t at = row * job.cols + b * BLOCK, left = job.cols - b * BLOCK;
                float *total = tile + (b - from) * BLOCK, scale = scales ? scales[b] : 1.0f;
                alignas(64) float value[BLOCK];
                if (left >= BLOCK) {
                    load_run<BLOCK>(job.parents[i], job.kinds[i], scale, at, BLOCK, value);
                    add_run<BLOCK>(value, job.weights[i], begun, BLOCK, total);
                } else {
                    load_run<0>(job.parents[i], job.kinds[i], scale, at, (int)left, value);
                    add_run<0>(value, job.weights[i], begun, (int)left, total);
                }
            }
            begun = true;
        }
        for (int64_t b = from; b < to; ++b) {
            const int64_t at = row * job.cols + b * BLOCK, left = job.cols - b * BLOCK;
            int32_t amax = 0;
            keep_run<0>(job, tile + (b - from) * BLOCK, at, (int)(left < BLOCK ? left : BLOCK), &amax);
        }
    }
}

void combine(const Combine* job, int64_t first, int64_t last) {
    const int64_t across = (job->cols + BLOCK - 1) / BLOCK;
    const Array<float> tile(BLOCK * BLOCK);
    const Array<double> lanes(BLOCK * job->count);
    Stage stage(job->count);
    if (in_rows(*job))
        for (int64_t row = first; row < last; ++row) combine_row(*job, row, tile.start);
    else for (int64_t block = first; block < last; ++block) {
        const int64_t row = block / across * BLOCK, col = block % across * BLOCK;
        const int height = (int)(job->rows - row < BLOCK ? job->rows - row : BLOCK);
        const int width = (int)(job->cols - col < BLOCK ? job->cols - col : BLOCK);
        const int64_t corner = row * job->cols + col;
        if (width == BLOCK)
            combine_block<BLOCK>(*job, block, height, width, corner, lanes.start, tile.start, stage);
        else
            combine_block<0>(*job, block, height, width, corner, lanes.start, tile.start, stage);
    }
}

}  // namespace

extern "C" {
extern const Loops SURGERY_LOOPS = {decode, combine, SURGERY_SWEEP, &SURGERY_PACKED, &SURGERY_ENCODE,
                                     SURGERY_NAME(surgery_largest, SURGERY_SET)};
}
