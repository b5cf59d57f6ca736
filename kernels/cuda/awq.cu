// AWQ's GEMM form (AwqWords of ../core/packed.h) on CUDA; the C interface of kernels/cpu/entry.cpp, with a stream.
//
// Words lie along the rows of the output and must come out across them, so that a tile of 64 columns of 32 words goes
// through shared memory: read in whole lines, 16 bytes a thread, and written in whole lines of each of its 256 rows.
// Built with -fmad=false.
#include <cuda_runtime.h>

#include "../core/packed.h"
#include "store.cuh"

using namespace surgery;

namespace {

constexpr int THREADS = 256, COLS = 64, WORDS = 32, OCTET = 8, QUAD = 4;
constexpr int STRIDE = COLS + 1;  // of a word's columns in shared memory: keeps both sides free of most conflicts

struct Eight {
    float scale[OCTET];
    int32_t zero[OCTET];
};

// What eight rows have in common in a group, by field.
__device__ __forceinline__ Eight grids(const AwqWords& job, int64_t group, int64_t word, bool aligned) {
    const uint16_t* from = job.scales + group * job.rows + word * OCTET;
    uint32_t pairs[OCTET / 2];
    if (aligned) {
        const uint4 four = __ldg((const uint4*)from);
        pairs[0] = four.x, pairs[1] = four.y, pairs[2] = four.z, pairs[3] = four.w;
    } else {
#pragma unroll
        for (int i = 0; i < OCTET / 2; ++i) pairs[i] = (uint32_t)from[2 * i] | (uint32_t)from[2 * i + 1] << 16;
    }
    const uint32_t zeros = __ldg(job.zeros + group * (job.rows / OCTET) + word);
    Eight found;
#pragma unroll
    for (int f = 0; f < OCTET; ++f) {
        const int row = awq_row(f);
        found.scale[f] = fp16_to_float((uint16_t)(pairs[row / 2] >> 16 * (row % 2)));
        found.zero[f] = zeros >> 4 * f & 15;
    }
    return found;
}

// A run whose columns are of several groups, one by one.
template <int KIND>
__device__ __noinline__ void scattered_run(const AwqWords& job, int64_t word, int64_t col, const uint32_t* from) {
#pragma unroll 1
    for (int i = 0; i < RUN_OF<KIND>; ++i) {
        const int64_t c = col + i, group = c / job.width;
        if (c >= job.cols) return;
        const uint32_t zeros = job.zeros[group * (job.rows / OCTET) + word];
#pragma unroll 1
        for (int f = 0; f < OCTET; ++f) {
            const int64_t row = word * OCTET + awq_row(f);
            const float scale = fp16_to_float(job.scales[group * job.rows + row]);
            const float value = on_grid(from[i] >> 4 * f & 15, zeros >> 4 * f & 15, scale);
            if (KIND == BF16) ((uint16_t*)job.out)[row * job.cols + c] = float_to_bf16(value);
            else ((float*)job.out)[row * job.cols + c] = value;
        }
    }
}

__device__ __forceinline__ void load_tile(const AwqWords& job, int64_t word, int64_t col, bool aligned,
                                          uint32_t (*turned)[STRIDE]) {
    constexpr int TIMES = COLS * WORDS / QUAD / THREADS;
    const int64_t across = job.rows / OCTET;
    uint4 loaded[TIMES];
#pragma unroll
    for (int t = 0; t < TIMES; ++t) {
        const int at = threadIdx.x + t * THREADS, c = at / (WORDS / QUAD), w = at % (WORDS / QUAD) * QUAD;
        const uint32_t* from = job.words + (col + c) * across + word + w;
        const int64_t left = col + c < job.cols ? across - word - w : 0;
        if (left >= QUAD && aligned) {
            loaded[t] = __ldcs((const uint4*)from);
        } else {
            loaded[t].x = left > 0 ? from[0] : 0, loaded[t].y = left > 1 ? from[1] : 0;
            loaded[t].z = left > 2 ? from[2] : 0, loaded[t].w = left > 3 ? from[3] : 0;
        }
    }
#pragma unroll
    for (int t = 0; t < TIMES; ++t) {
        const int at = threadIdx.x + t * THREADS, c = at / (WORDS / QUAD), w = at % (WORDS / QUAD) * QUAD;
        turned[w][c] = loaded[t].x, turned[w + 1][c] = loaded[t].y;
        turned[w + 2][c] = loaded[t].z, turned[w + 3][c] = loaded[t].w;
    }
}

// Eight neighbouring lanes have a line of one word's rows. `even`: the columns of a run are of one group.
template <int KIND>
__global__ void __launch_bounds__(THREADS)
    awq_kernel(const __grid_constant__ AwqWords job, bool even, bool aligned, bool line) {
    constexpr int WIDE = RUN_OF<KIND>, LINE = 8 * WIDE;
    __shared__ uint32_t turned[WORDS][STRIDE];
    const int64_t first = (int64_t)blockIdx.y * WORDS, col = (int64_t)blockIdx.x * COLS;
    load_tile(job, first, col, aligned, turned);
    __syncthreads();
    const int w = threadIdx.x / 8;
    const int64_t word = first + w;
    if (word >= job.rows / OCTET) return;
#pragma unroll
    for (int half = 0; half < COLS / LINE; ++half) {
        const int at = half * LINE + threadIdx.x % 8 * WIDE;
        const int64_t begin = col + at, count = job.cols - begin;
        if (count <= 0) return;
        if (!even) {
            scattered_run<KIND>(job, word, begin, turned[w] + at);
            continue;
        }
        uint32_t words[WIDE];
#pragma unroll
        for (int i = 0; i < WIDE; ++i) words[i] = turned[w][at + i];
        const Eight grid = grids(job, begin / job.width, word, line);
#pragma unroll
        for (int f = 0; f < OCTET; ++f) {
            float v[WIDE];
#pragma unroll
            for (int i = 0; i < WIDE; ++i) v[i] = on_grid(words[i] >> 4 * f & 15, grid.zero[f], grid.scale[f]);
            const int64_t row = word * OCTET + awq_row(f);
            store<KIND, WIDE>(job.out, row * job.cols + begin, count, job.cols % WIDE == 0, v);
        }
    }
}

template <int KIND>
cudaError_t launch(const AwqWords& job, cudaStream_t stream) {
    const int64_t across = job.rows / OCTET, down = (across + WORDS - 1) / WORDS;
    if (down > 65535) return cudaErrorInvalidConfiguration;
    const bool aligned = across % QUAD == 0 && (uintptr_t)job.words % 16 == 0;
    const bool line = (uintptr_t)job.scales % 16 == 0;
    const dim3 grid((unsigned)((job.cols + COLS - 1) / COLS), (unsigned)down);
    awq_kernel<KIND><<<grid, THREADS, 0, stream>>>(job, job.width % RUN_OF<KIND> == 0, aligned, line);
    return cudaGetLastError();
}

}  // namespace

extern "C" int32_t surgery_cuda_awq(const AwqWords* job, cudaStream_t stream) {
    return job->kind == BF16 ? launch<BF16>(*job, stream) : launch<F32>(*job, stream);
}
