// Weighted sums and FP8 blocks on CUDA; the C interface of kernels/cpu/entry.cpp, with a stream. Sums of FP8 parents
// alone go to fp8_sums.cu.
//
// One thread block owns one 128 x 128 block: 512 threads, each with two runs of 16 neighbours, so that a
// warp reads four whole 128-byte lines of codes. The tile stays in registers between its amax and
// its codes, hence one pass. Built with -fmad=false: products and sums are rounded one by one, as on the CPU.
#include "e4m3.cuh"
#include "fp8_encode.h"
#include "fp8_sums.h"
#include "sixteen.cuh"

using namespace surgery;

namespace {

constexpr int THREADS = 512, RUNS = 2, STRIDE = BLOCK / RUNS, MOST_PARENTS = 16;

struct Parents {
    const void* values[MOST_PARENTS];
    const float* scales[MOST_PARENTS];
    float weights[MOST_PARENTS];
    int32_t kinds[MOST_PARENTS];
};

// 16 values as stored, in registers: loads of both runs are under way before the first is decoded.
template <int KIND>
struct Raw {
    static constexpr int WORDS = KIND == FP8_BLOCK ? 4 : KIND == BF16 ? 8 : 16;
    uint32_t words[WORDS];

    // `whole`: 16 values lie there, aligned to 16 bytes; else the first `count` do, and zeros follow.
    __device__ __forceinline__ void load(const void* from, int64_t at, int count, bool whole) {
        constexpr int SIZE = WORDS / 4;
        if (whole) {
#pragma unroll
            for (int i = 0; i < SIZE; ++i) {
                const uint4 four = __ldcs((const uint4*)((const uint8_t*)from + at * SIZE) + i);
                words[4 * i] = four.x, words[4 * i + 1] = four.y;
                words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = 0;
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
            if (i >= count) continue;
            if (KIND == FP8_BLOCK) words[i / 4] |= (uint32_t)((const uint8_t*)from)[at + i] << 8 * (i % 4);
            if (KIND == BF16) words[i / 2 % WORDS] |= (uint32_t)((const uint16_t*)from)[at + i] << 16 * (i % 2);
            if (KIND == F32) words[i % WORDS] = ((const uint32_t*)from)[at + i];
        }
    }

    // Values 4g .. 4g + 3.
    __device__ __forceinline__ void values(int g, float* to) const {
        if (KIND == FP8_BLOCK) {
            unpack4(words[g], to);
        } else if (KIND == BF16) {
            const uint32_t a = words[2 * g % WORDS], b = words[(2 * g + 1) % WORDS];
            to[0] = float_of(a << 16), to[1] = float_of(a & 0xFFFF0000u);
            to[2] = float_of(b << 16), to[3] = float_of(b & 0xFFFF0000u);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) to[i] = float_of(words[(4 * g + i) % WORDS]);
        }
    }
};

// The quotient by a correctly rounded reciprocal and one remainder (Markstein) is the IEEE quotient where
// nothing under- or overflows, which `combine_kernel` sees to. Quotients too small for that round to
// code 0 either way; the remainder loses the sign of a zero, which is put back; infinity and NaN
// have no remainder.
__device__ __forceinline__ float quotient(float value, float scale, float reciprocal) {
    const float first = __fmul_rn(value, reciprocal);
    const float rest = __fmaf_rn(-first, scale, value);
    const float second = copysignf(__fmaf_rn(rest, reciprocal, first), value);
    return fabsf(first) <= 3.4028234663852886e38f ? second : first;
}

// Where a thread's first run lies; the others follow STRIDE rows below one another.
struct Place {
    int64_t at, step;
    int32_t count;  // values of a run inside the matrix, 0 .. 16
    int32_t rows;   // rows from the first run on
    bool aligned;

    __device__ __forceinline__ Place(int64_t rows_, int64_t cols, int64_t across, bool aligned_) {
        const int64_t down = blockIdx.x / across;
        const int64_t row = down * BLOCK + threadIdx.x / 8;
        const int64_t col = (blockIdx.x - down * across) * BLOCK + threadIdx.x % 8 * RUN;
        at = row * cols + col;
        step = cols * STRIDE;
        count = (int32_t)max((int64_t)0, min(cols - col, (int64_t)RUN));
        rows = (int32_t)max((int64_t)0, min(rows_ - row, (int64_t)BLOCK));
        aligned = aligned_;
    }

    __device__ __forceinline__ int64_t run(int r) const { return at + r * step; }
    __device__ __forceinline__ int32_t values(int r) const { return r * STRIDE < rows ? count : 0; }
    __device__ __forceinline__ bool whole(int r) const { return aligned && values(r) == RUN; }
};

// What a thread keeps of its 32 values while the parents pass by.
template <bool SQUARES>
struct Tile {
    float total[RUNS][RUN];
    float base[SQUARES ? RUNS : 1][RUN];
    double square;
};

template <int KIND, bool SQUARES>
__device__ __forceinline__ void add_parent(Tile<SQUARES>& tile, const void* from, float scale, float weight,
                                           bool first, const Place& place) {
    // Raw float32 takes as many registers as the tile itself: one run at a time.
    constexpr int TOGETHER = KIND == FP8_BLOCK ? RUNS : 1;
#pragma unroll
    for (int r0 = 0; r0 < RUNS; r0 += TOGETHER) {
        Raw<KIND> raw[TOGETHER];
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r)
            raw[r].load(from, place.run(r0 + r), place.values(r0 + r), place.whole(r0 + r));
#pragma unroll
        for (int i = 0; i < TOGETHER * RUN; i += 4) {
            const int r = r0 + i / RUN, c = i % RUN;
            float value[4];
            raw[i / RUN].values(c / 4, value);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float v = KIND == FP8_BLOCK ? __fmul_rn(value[k], scale) : value[k];
                if (SQUARES) {
                    if (first) tile.base[SQUARES ? r : 0][c + k] = v;
                    const double gap = first ? (double)v : (double)__fsub_rn(tile.base[SQUARES ? r : 0][c + k], v);
                    tile.square = __fma_rn(gap, gap, tile.square);
                }
                const float term = __fmul_rn(v, weight);
                const float sum = __fadd_rn(tile.total[r][c + k], term);
                tile.total[r][c + k] = SQUARES && weight == 0.0f ? tile.total[r][c + k] : sum;
            }
        }
    }
}

// INPUT: the kind of every parent, or -1 where they differ. SQUARES: with sums, and the base kept for them.
template <int INPUT, int OUTPUT, bool SQUARES>
__global__ void __launch_bounds__(THREADS, SQUARES ? 1 : 2)
    combine_kernel(Parents parents, int count, void* out, float* out_scales, double* sums, int64_t rows,
                   int64_t cols, int64_t across, bool ue8m0, bool aligned) {
    __shared__ float found[THREADS / 32];
    __shared__ double added[THREADS / 32];
    const int64_t block = blockIdx.x;
    Tile<SQUARES> tile;
    const Place place(rows, cols, across, aligned);
    // -0 + x is x for every x, zeros and their signs included.
#pragma unroll
    for (int i = 0; i < RUNS * RUN; ++i) tile.total[i / RUN][i % RUN] = -0.0f;
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
        float amax = 0.0f;
#pragma unroll
        for (int i = 0; i < RUNS * RUN; ++i) amax = fmaxf(amax, fabsf(tile.total[i / RUN][i % RUN]));
        if (__syncthreads_or(amax > 3.4028234663852886e38f)) {
            amax = 0.0f;
#pragma unroll
            for (int i = 0; i < RUNS * RUN; ++i)
                amax = fmaxf(amax, float_of(finite_magnitude(tile.total[i / RUN][i % RUN])));
        }
        amax = float_of(__reduce_max_sync(~0u, bits_of(amax)));
        if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = amax;
        __syncthreads();
        amax = float_of(__reduce_max_sync(~0u, bits_of(found[threadIdx.x % (THREADS / 32)])));
        float scale = block_scale(amax, ue8m0);
        if (threadIdx.x == 0) out_scales[block] = scale;
        // Both sides times the same power of two, exact where the quotient is not far below code 1.
        const float factor = scale < 0x1p-60f ? 0x1p100f : scale > 0x1p60f ? 0x1p-64f : 1.0f;
        if (factor != 1.0f) {
#pragma unroll
            for (int i = 0; i < RUNS * RUN; ++i) tile.total[i / RUN][i % RUN] *= factor;
            scale *= factor;
        }
        const float reciprocal = __frcp_rn(scale);
#pragma unroll
        for (int i = 0; i < RUNS * RUN; ++i)
            tile.total[i / RUN][i % RUN] = quotient(tile.total[i / RUN][i % RUN], scale, reciprocal);
    }
#pragma unroll
    for (int r = 0; r < RUNS; ++r)
        store<OUTPUT>(out, place.run(r), place.values(r), place.whole(r), tile.total[r]);
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
    int32_t kind = job.kinds[0];
    for (int32_t i = 1; i < job.count; ++i)
        if (job.kinds[i] != kind) kind = -1;
    if (kind == FP8_BLOCK) launch<FP8_BLOCK, OUTPUT>(job, parents, across, blocks, aligned, stream);
    else if (kind == BF16) launch<BF16, OUTPUT>(job, parents, across, blocks, aligned, stream);
    else if (kind == F32) launch<F32, OUTPUT>(job, parents, across, blocks, aligned, stream);
    else launch<-1, OUTPUT>(job, parents, across, blocks, aligned, stream);
}

}  // namespace

extern "C" int32_t surgery_cuda_combine(const Combine* job, cudaStream_t stream) {
    const int64_t across = (job->cols + BLOCK - 1) / BLOCK, blocks = (job->rows + BLOCK - 1) / BLOCK * across;
    if (blocks > 0x7FFFFFFF || job->count > MOST_PARENTS) return cudaErrorInvalidConfiguration;
    if (takes_fp8_sum(*job)) return add_fp8(*job, stream);
    if (takes_encoding(*job)) return encode_fp8(*job, stream);
    Parents parents = {};
    bool aligned = job->cols % RUN == 0 && even(job->out);
    for (int32_t i = 0; i < job->count; ++i) {
        parents.values[i] = job->parents[i];
        parents.scales[i] = job->scales[i];
        parents.weights[i] = job->weights[i];
        parents.kinds[i] = job->kinds[i];
        aligned = aligned && even(job->parents[i]);
    }
    if (job->out_kind == FP8_BLOCK) choose<FP8_BLOCK>(*job, parents, across, blocks, aligned, stream);
    else if (job->out_kind == BF16) choose<BF16>(*job, parents, across, blocks, aligned, stream);
    else choose<F32>(*job, parents, across, blocks, aligned, stream);
    return cudaGetLastError();
}
