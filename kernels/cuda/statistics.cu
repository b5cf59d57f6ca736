// Dot products and L1 norms of blocks on CUDA; see statistics.h of the CPU.
//
// Sums have the CPU's order, because merges follow from them: down the columns of a 128 x 128 block, then halves onto
// halves. A warp has a block, a lane four of its columns, and goes down their rows, four rows' loads under way together.
// Products of float32 numbers are exact in float64, so that a fused multiply-add rounds as a sum does.
#include "statistics.h"

#include "thinning.cuh"

namespace surgery {

namespace {

constexpr int WARPS = 8, FOUR = 4, MOST_VECTORS = 4, PAIRS = MOST_VECTORS * (MOST_VECTORS + 1) / 2;

// A warp's block, and where its lanes begin.
struct Strip {
    int64_t block, at;
    int32_t height, count;

    __device__ __forceinline__ Strip(int64_t rows, int64_t cols, int64_t across) {
        block = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
        const int64_t down = block / across, row = down * BLOCK;
        const int64_t col = (block - down * across) * BLOCK + threadIdx.x % 32 * FOUR;
        at = row * cols + col;
        height = (int32_t)max((int64_t)0, min(rows - row, (int64_t)BLOCK));
        count = (int32_t)max((int64_t)0, min(cols - col, (int64_t)FOUR));
    }
};

// The sum of a block's 128 columns.
__device__ __forceinline__ double folded(double* column) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) {
#pragma unroll
        for (int c = 0; c < FOUR; ++c) column[c] += __shfl_xor_sync(~0u, column[c], lanes);
    }
    return (column[0] + column[2]) + (column[1] + column[3]);
}

// Vectors are parents, less the base if `offset` (the base itself as it is). Their products go to `columns` of the
// block's sums, those of -1 nowhere.
struct Dots {
    Parents parents;  // the base, then the vectors
    double* sums;
    int64_t rows, cols, across, blocks;
    int32_t width;  // columns
    int32_t columns[PAIRS];
    int32_t minus[MOST_VECTORS];
    bool aligned;
};

template <int KIND, int VECTORS>
__global__ void __launch_bounds__(WARPS * 32) dots_kernel(const __grid_constant__ Dots job) {
    constexpr int ROWS = KIND == ANY || VECTORS == 4 ? 2 : 4;
    const Strip strip(job.rows, job.cols, job.across);
    if (strip.block >= job.blocks) return;
    double sum[VECTORS * (VECTORS + 1) / 2][FOUR] = {};
    float scale[VECTORS + 1];
#pragma unroll
    for (int p = 0; p <= VECTORS; ++p) scale[p] = Held<KIND, FOUR>::scale(job.parents, p, strip.block);
#pragma unroll 1
    for (int first = 0; first < strip.height; first += ROWS) {
        Held<KIND, FOUR> raw[ROWS][VECTORS + 1];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int64_t at = strip.at + (first + r) * job.cols;
            const int32_t count = first + r < strip.height ? strip.count : 0;
#pragma unroll
            for (int p = 0; p <= VECTORS; ++p) raw[r][p].load(job.parents, p, at, count, job.aligned, p == 0);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (first + r >= strip.height) break;
            float base[FOUR], of[VECTORS][FOUR];
            raw[r][0].values(job.parents, 0, scale[0], base);
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                raw[r][v + 1].values(job.parents, v + 1, scale[v + 1], of[v]);
                if (job.minus[v]) {
#pragma unroll
                    for (int c = 0; c < FOUR; ++c) of[v][c] = __fsub_rn(of[v][c], base[c]);
                }
            }
#pragma unroll
            for (int i = 0; i < VECTORS; ++i) {
#pragma unroll
                for (int j = 0; j <= i; ++j) {
                    if (job.columns[i * (i + 1) / 2 + j] < 0) continue;
#pragma unroll
                    for (int c = 0; c < FOUR; ++c) {
                        double& own = sum[i * (i + 1) / 2 + j][c];
                        if (c < strip.count) own = __fma_rn((double)of[i][c], (double)of[j][c], own);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < VECTORS * (VECTORS + 1) / 2; ++k) {
        const double found = folded(sum[k]);
        if (job.columns[k] >= 0 && threadIdx.x % 32 == 0) job.sums[strip.block * job.width + job.columns[k]] = found;
    }
}

template <int KIND>
void launch(const Dots& job, int vectors, cudaStream_t stream) {
    const unsigned grid = (unsigned)((job.blocks + WARPS - 1) / WARPS);
    if (vectors <= 2) dots_kernel<KIND, 2><<<grid, WARPS * 32, 0, stream>>>(job);
    else if (vectors == 3) dots_kernel<KIND, 3><<<grid, WARPS * 32, 0, stream>>>(job);
    else dots_kernel<KIND, 4><<<grid, WARPS * 32, 0, stream>>>(job);
}

// `column(i, j)`, i >= j: where the product of parents i and j goes. Up to four vectors are read once; of more, each
// pair of twos is.
template <typename Column>
cudaError_t add_products(const Combine& at, int32_t first, bool offset, int32_t width, Column column, cudaStream_t stream) {
    const int32_t vectors = at.count - first, step = vectors <= MOST_VECTORS ? MOST_VECTORS : MOST_VECTORS / 2;
    bool aligned;
    const Parents all = parents_of(at, FOUR, &aligned);
    for (int32_t a = 0; a < vectors; a += step) {
        for (int32_t b = vectors > step ? a + step : a; b < vectors; b += step) {
            Dots job = {};
            int32_t chosen[MOST_VECTORS], count = 0;
            for (int32_t k = a; k < a + step && k < vectors; ++k) chosen[count++] = first + k;
            for (int32_t k = b; b != a && k < b + step && k < vectors; ++k) chosen[count++] = first + k;
            for (int32_t v = -1; v < MOST_VECTORS; ++v) {
                const int32_t p = v < 0 ? 0 : chosen[v < count ? v : count - 1];
                job.parents.values[v + 1] = all.values[p];
                job.parents.scales[v + 1] = all.scales[p];
                job.parents.kinds[v + 1] = all.kinds[p];
                if (v >= 0) job.minus[v] = offset && p > 0;
            }
            for (int32_t i = 0; i < MOST_VECTORS; ++i)
                for (int32_t j = 0; j <= i; ++j)
                    job.columns[i * (i + 1) / 2 + j] = i < count ? column(chosen[i], chosen[j]) : -1;
            job.sums = at.sums;
            job.rows = at.rows;
            job.cols = at.cols;
            job.across = (at.cols + BLOCK - 1) / BLOCK;
            job.blocks = (at.rows + BLOCK - 1) / BLOCK * job.across;
            job.width = width;
            job.aligned = aligned;
            const int32_t kind = kind_of(at);
            if (kind == FP8_BLOCK) launch<FP8_BLOCK>(job, count, stream);
            else if (kind == BF16) launch<BF16>(job, count, stream);
            else launch<ANY>(job, count, stream);
        }
    }
    return cudaGetLastError();
}

struct Sizes {
    Parents parents;  // the base and one model
    Kept kept;
    double* sums;
    int64_t rows, cols, across, blocks;
    int32_t width, column, kept_column;
    bool aligned;
};

template <int KIND>
__global__ void __launch_bounds__(WARPS * 32, 3) sizes_kernel(const __grid_constant__ Sizes job) {
    constexpr int ROWS = KIND == ANY ? 2 : 4;
    const Strip strip(job.rows, job.cols, job.across);
    if (strip.block >= job.blocks) return;
    double whole[FOUR] = {}, rest[FOUR] = {};
    float scale[2];
#pragma unroll
    for (int p = 0; p < 2; ++p) scale[p] = Held<KIND, FOUR>::scale(job.parents, p, strip.block);
#pragma unroll 1
    for (int first = 0; first < strip.height; first += ROWS) {
        Held<KIND, FOUR> raw[ROWS][2];
        uint32_t bits[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int64_t at = strip.at + (first + r) * job.cols;
            const int32_t count = first + r < strip.height ? strip.count : 0;
#pragma unroll
            for (int p = 0; p < 2; ++p) raw[r][p].load(job.parents, p, at, count, job.aligned);
            bits[r] = job.kept.bits(at, count);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (first + r >= strip.height) break;
            float base[FOUR], model[FOUR];
            raw[r][0].values(job.parents, 0, scale[0], base);
            raw[r][1].values(job.parents, 1, scale[1], model);
#pragma unroll
            for (int c = 0; c < FOUR; ++c) {
                model[c] = __fsub_rn(model[c], base[c]);
                if (c < strip.count) whole[c] = __dadd_rn(whole[c], (double)fabsf(model[c]));
            }
            job.kept.thin<FOUR>(model, bits[r]);
#pragma unroll
            for (int c = 0; c < FOUR; ++c)
                if (c < strip.count) rest[c] = __dadd_rn(rest[c], (double)fabsf(model[c]));
        }
    }
    const double all = folded(whole), stays = folded(rest);
    if (threadIdx.x % 32) return;
    job.sums[strip.block * job.width + job.column] = all;
    job.sums[strip.block * job.width + job.kept_column] = stays;
}

}  // namespace

cudaError_t add_task_sums(const Combine& job, cudaStream_t stream) {
    const int32_t count = job.count, width = count + (count - 1) * (count - 2) / 2;
    return add_products(job, 0, true, width, [count](int32_t i, int32_t j) {
        if (i == j) return i;
        return j ? count + (i - 1) * (i - 2) / 2 + j - 1 : -1;
    }, stream);
}

}  // namespace surgery

using namespace surgery;

extern "C" {

int32_t surgery_cuda_products(const Products* job, cudaStream_t stream) {
    const int32_t first = job->offset ? 1 : 0, vectors = job->at.count - first;
    if (job->at.count > MOST_PARENTS) return cudaErrorInvalidConfiguration;
    return add_products(job->at, first, job->offset, vectors * (vectors + 1) / 2, [first](int32_t i, int32_t j) {
        return (i - first) * (i - first + 1) / 2 + j - first;
    }, stream);
}

int32_t surgery_cuda_sizes(const Tasks* job, cudaStream_t stream) {
    const Combine& at = job->at;
    if (at.count > MOST_PARENTS) return cudaErrorInvalidConfiguration;
    const cudaError_t status = draw_bits(*job, stream);
    if (status != cudaSuccess) return status;
    bool aligned;
    const Parents all = parents_of(at, FOUR, &aligned);
    for (int32_t i = 1; i < at.count; ++i) {
        Sizes one = {};
        one.parents = pair_of(all, i);
        one.kept = kept_of(*job, i);
        one.sums = at.sums;
        one.rows = at.rows;
        one.cols = at.cols;
        one.across = (at.cols + BLOCK - 1) / BLOCK;
        one.blocks = (at.rows + BLOCK - 1) / BLOCK * one.across;
        one.width = 2 * (at.count - 1);
        one.column = i - 1;
        one.kept_column = at.count - 1 + i - 1;
        one.aligned = aligned;
        const unsigned grid = (unsigned)((one.blocks + WARPS - 1) / WARPS);
        if (at.kinds[0] != at.kinds[i] || at.kinds[i] == F32) sizes_kernel<ANY><<<grid, WARPS * 32, 0, stream>>>(one);
        else if (at.kinds[i] == BF16) sizes_kernel<BF16><<<grid, WARPS * 32, 0, stream>>>(one);
        else sizes_kernel<FP8_BLOCK><<<grid, WARPS * 32, 0, stream>>>(one);
    }
    return cudaGetLastError();
}

}
