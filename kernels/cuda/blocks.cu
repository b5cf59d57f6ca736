// Weighted sums and FP8 blocks on CUDA; the C interface of kernels/cpu/entry.cpp, with a stream. Sums of FP8 parents
// alone go to fp8_sums.cu.
//
// One thread block owns one 128 x 128 block: 512 threads, each with two runs of 16 neighbours, so that a
// warp reads four whole 128-byte lines of codes. The tile stays in registers between its amax and
// its codes, hence one pass. Built with -fmad=false: products and sums are rounded one by one, as on the CPU.
#include "fp8_encode.h"
#include "fp8_sums.h"
#include "parents.cuh"
#include "tile.cuh"

using namespace surgery;

namespace {

using Runs = Place<RUN>;
constexpr int THREADS = TILE_THREADS, RUNS = Runs::RUNS;

// What a thread keeps of its 32 values while the parents pass by.
template <bool SQUARES>
struct Tile {
    float total[RUNS * RUN];
    float base[SQUARES ? RUNS : 1][RUN];
    double square;
};

template <int KIND, bool SQUARES>
__device__ __forceinline__ void add_parent(Tile<SQUARES>& tile, const void* from, float scale, float weight,
                                           bool first, const Runs& place) {
    // Raw float32 takes as many registers as the tile itself: one run at a time.
    constexpr int TOGETHER = KIND == FP8_BLOCK ? RUNS : 1;
#pragma unroll
    for (int r0 = 0; r0 < RUNS; r0 += TOGETHER) {
        Raw<KIND, RUN> raw[TOGETHER];
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r)
            raw[r].load(from, place.run(r0 + r), place.values(r0 + r), place.aligned);
#pragma unroll
        for (int i = 0; i < TOGETHER * RUN; i += 4) {
            const int r = r0 + i / RUN, c = i % RUN;
            float value[4];
            raw[i / RUN].four(c / 4, value);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float v = KIND == FP8_BLOCK ? __fmul_rn(value[k], scale) : value[k];
                if (SQUARES) {
                    if (first) tile.base[SQUARES ? r : 0][c + k] = v;
                    const double gap = first ? (double)v : (double)__fsub_rn(tile.base[SQUARES ? r : 0][c + k], v);
                    tile.square = __fma_rn(gap, gap, tile.square);
                }
                const float term = __fmul_rn(v, weight);
                const float sum = __fadd_rn(tile.total[r * RUN + c + k], term);
                tile.total[r * RUN + c + k] = SQUARES && weight == 0.0f ? tile.total[r * RUN + c + k] : sum;
            }
        }
    }
}

// INPUT: the kind of every parent, or ANY. SQUARES: with sums, and the base kept for them.
template <int INPUT, int OUTPUT, bool SQUARES>
__global__ void __launch_bounds__(THREADS, SQUARES ? 1 : 2)
    combine_kernel(Parents parents, int count, void* out, float* out_scales, double* sums, int64_t rows,
                   int64_t cols, int64_t across, bool ue8m0, bool aligned) {
    __shared__ double added[THREADS / 32];
    const int64_t block = blockIdx.x;
    Tile<SQUARES> tile;
    const Runs place(block, rows, cols, across, aligned);
    // -0 + x is x for every x, zeros and their signs included.
#pragma unroll
    for (int i = 0; i < RUNS * RUN; ++i) tile.total[i] = -0.0f;
    for (int p = 0; p < count; ++p) {
        const float weight = parents.weights[p];
        if (!SQUARES && weight == 0.0f) continue;
        const void* from = parents.values[p];
        const int32_t kind = INPUT >= 0 ? INPUT : parents.kinds[p];
        const float scale = kind == FP8_BLOCK ? parents.scales[p][block] : 1.0f;
        tile.square = 0.0;
        if (kind == FP8_BLOCK)
            add_parent<FP8_BLOCK, SQUARES>(tile, from, scale, weight, p == 0, place);
        else if (kind == BF16)
            add_parent<BF16, SQUARES>(tile, from, scale, weight, p == 0, place);
        else
            add_parent<F32, SQUARES>(tile, from, scale, weight, p == 0, place);
        if (SQUARES) {
            for (int lane = 16; lane; lane /= 2) tile.square += __shfl_xor_sync(~0u, tile.square, lane);
            if (threadIdx.x % 32 == 0) added[threadIdx.x / 32] = tile.square;
            __syncthreads();
            if (threadIdx.x == 0) {
                for (int w = 1; w < THREADS / 32; ++w) tile.square += added[w];
                sums[block * count + p] = tile.square;
            }
            __syncthreads();
        }
    }
    if (!out) return;
    if (OUTPUT == FP8_BLOCK) {
        const float scale = divide_block<RUNS * RUN>(tile.total, ue8m0);
        if (threadIdx.x == 0) out_scales[block] = scale;
    }
#pragma unroll
    for (int r = 0; r < RUNS; ++r)
        store<OUTPUT, RUN>(out, place.run(r), place.values(r), place.whole(r), tile.total + r * RUN);
}

template <int INPUT, int OUTPUT>
void launch(const Combine& job, const Parents& parents, int64_t across, int64_t blocks, bool aligned,
            cudaStream_t stream) {
    if (job.sums)
        combine_kernel<INPUT, OUTPUT, true><<<(unsigned)blocks, THREADS, 0, stream>>>(
            parents, job.count, job.out, job.out_scales, job.sums, job.rows, job.cols, across, job.ue8m0,
            aligned);
    else
        combine_kernel<INPUT, OUTPUT, false><<<(unsigned)blocks, THREADS, 0, stream>>>(
            parents, job.count, job.out, job.out_scales, job.sums, job.rows, job.cols, across, job.ue8m0,
            aligned);
}

template <int OUTPUT>
void choose(const Combine& job, const Parents& parents, int64_t across, int64_t blocks, bool aligned,
            cudaStream_t stream) {
    const int32_t kind = kind_of(job);
    if (kind == FP8_BLOCK) launch<FP8_BLOCK, OUTPUT>(job, parents, across, blocks, aligned, stream);
    else if (kind == BF16) launch<BF16, OUTPUT>(job, parents, across, blocks, aligned, stream);
    else if (kind == F32) launch<F32, OUTPUT>(job, parents, across, blocks, aligned, stream);
    else launch<ANY, OUTPUT>(job, parents, across, blocks, aligned, stream);
}

}  // namespace

extern "C" int32_t surgery_cuda_combine(const Combine* job, cudaStream_t stream) {
    const int64_t across = (job->cols + BLOCK - 1) / BLOCK, blocks = (job->rows + BLOCK - 1) / BLOCK * across;
    if (blocks > 0x7FFFFFFF || job->count > MOST_PARENTS) return cudaErrorInvalidConfiguration;
    if (takes_fp8_sum(*job)) return add_fp8(*job, stream);
    if (takes_encoding(*job)) return encode_fp8(*job, stream);
    bool aligned;
    const Parents parents = parents_of(*job, RUN, &aligned);
    if (job->out_kind == FP8_BLOCK) choose<FP8_BLOCK>(*job, parents, across, blocks, aligned, stream);
    else if (job->out_kind == BF16) choose<BF16>(*job, parents, across, blocks, aligned, stream);
    else choose<F32>(*job, parents, across, blocks, aligned, stream);
    return cudaGetLastError();
}
