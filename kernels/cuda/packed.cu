// Packed forms of few bits (../core/packed.h) on CUDA; the C interface of kernels/cpu/entry.cpp, with a stream.
//
// Threads are mapped to the output: each makes 16 bytes of it, so that a warp stores four whole lines. A thread has
// several such runs, whose loads are under way together. Built with -fmad=false.
#include <cuda_runtime.h>

#include "../core/packed.h"
#include "store.cuh"

using namespace surgery;

namespace {

constexpr int THREADS = 128, TOGETHER = 4, QUAD = 4;

// Four codes from number `first` on, a multiple of 4, at the bottom of a word.
template <int BITS>
__device__ __forceinline__ uint32_t quad(const uint32_t* words, int64_t count, int64_t first) {
    const int64_t word = first * BITS >> 5;
    const uint32_t shift = (uint32_t)(first * BITS) & 31;
    const uint32_t low = word < count ? __ldg(words + word) : 0;
    if (32 % (QUAD * BITS) == 0) return low >> shift;
    const bool more = shift + QUAD * BITS > 32 && word + 1 < count;
    return __funnelshift_r(low, more ? __ldg(words + word + 1) : 0, shift);
}

// A run whose columns are of several groups, one by one.
template <int BITS, int KIND>
__device__ __noinline__ void scattered_run(const Stream& job, int64_t row, int64_t col) {
    const uint32_t* words = job.words + row * job.row_words;
#pragma unroll 1
    for (int64_t c = col; c < min(col + RUN_OF<KIND>, job.cols); ++c) {
        const uint32_t code = quad<BITS>(words, job.row_words, c & ~(int64_t)3) >> (c & 3) * BITS & ((1u << BITS) - 1);
        const int64_t place = row * job.groups + c / job.width;
        const float value = on_grid(code, job.zeros ? job.zeros[place] : job.zero, job.scales[place]);
        if (KIND == BF16) ((uint16_t*)job.out)[row * job.cols + c] = float_to_bf16(value);
        else ((float*)job.out)[row * job.cols + c] = value;
    }
}

// Thread x has a run of columns, in TOGETHER rows at a time. `even`: its columns are of one group.
template <int BITS, int KIND>
__global__ void __launch_bounds__(THREADS)
    stream_kernel(const __grid_constant__ Stream job, bool even, bool aligned) {
    constexpr int WIDE = RUN_OF<KIND>;
    const int64_t col = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * WIDE;
    const int64_t count = job.cols - col;
    if (count <= 0) return;
    const int64_t group = col / job.width;
    for (int64_t first = (int64_t)blockIdx.y * TOGETHER; first < job.rows; first += (int64_t)gridDim.y * TOGETHER) {
        uint32_t codes[TOGETHER][WIDE / QUAD];
        float scale[TOGETHER];
        int32_t zero[TOGETHER];
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r) {
            const int64_t row = min(first + r, job.rows - 1);
#pragma unroll
            for (int q = 0; q < WIDE / QUAD; ++q)
                codes[r][q] = quad<BITS>(job.words + row * job.row_words, job.row_words, col + q * QUAD);
            scale[r] = __ldg(job.scales + row * job.groups + group);
            zero[r] = job.zeros ? __ldg(job.zeros + row * job.groups + group) : job.zero;
        }
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r) {
            const int64_t row = first + r;
            if (row >= job.rows) break;
            if (!even) {
                scattered_run<BITS, KIND>(job, row, col);
                continue;
            }
            float v[WIDE];
#pragma unroll
            for (int i = 0; i < WIDE; ++i)
                v[i] = on_grid(codes[r][i / QUAD] >> i % QUAD * BITS & ((1u << BITS) - 1), zero[r], scale[r]);
            store<KIND, WIDE>(job.out, row * job.cols + col, count, aligned, v);
        }
    }
}

// Each lane has a table of the levels in a bank of its own. A block has 2^shift codes.
template <int KIND>
__global__ void __launch_bounds__(THREADS)
    nibbles_kernel(const __grid_constant__ Nibbles job, int shift, bool aligned) {
    constexpr int WIDE = RUN_OF<KIND>;
    __shared__ float levels[16 * 32];
    for (int i = threadIdx.x; i < 16 * 32; i += THREADS) levels[i] = job.levels[i / 32];
    __syncthreads();
    const float* mine = levels + threadIdx.x % 32;
    const int flip = job.high_first ? 4 : 0;
    const int64_t base = (int64_t)blockIdx.x * (THREADS * TOGETHER) + threadIdx.x;
    uint32_t codes[TOGETHER];
    float scale[TOGETHER];
#pragma unroll
    for (int r = 0; r < TOGETHER; ++r) {
        const int64_t at = (base + r * THREADS) * WIDE, count = job.count - at;
        codes[r] = 0;
        scale[r] = count > 0 ? __ldg(job.scales + (at >> shift)) : 0.0f;
        const uint8_t* from = job.bytes + at / 2;
        if (count >= WIDE && aligned) {
            codes[r] = WIDE == 8 ? __ldcs((const uint32_t*)from) : __ldcs((const uint16_t*)from);
        } else {
#pragma unroll
            for (int i = 0; i < WIDE / 2; ++i)
                if (2 * i < count) codes[r] |= (uint32_t)from[i] << 8 * i;
        }
    }
#pragma unroll
    for (int r = 0; r < TOGETHER; ++r) {
        const int64_t at = (base + r * THREADS) * WIDE, count = job.count - at;
        if (count <= 0) break;
        float v[WIDE];
#pragma unroll
        for (int i = 0; i < WIDE; ++i) v[i] = __fmul_rn(mine[(codes[r] >> (4 * i ^ flip) & 15) * 32], scale[r]);
        store<KIND, WIDE>(job.out, at, count, aligned && count >= WIDE, v);
    }
}

template <int BITS, int KIND>
void launch(const Stream& job, cudaStream_t stream) {
    constexpr int WIDE = RUN_OF<KIND>;
    const int64_t across = (job.cols + THREADS * WIDE - 1) / (THREADS * WIDE);
    const int64_t down = (job.rows + TOGETHER - 1) / TOGETHER;
    const bool aligned = job.cols % WIDE == 0 && (uintptr_t)job.out % 16 == 0;
    const dim3 grid((unsigned)across, (unsigned)(down < 65535 ? down : 65535));
    stream_kernel<BITS, KIND><<<grid, THREADS, 0, stream>>>(job, job.width % WIDE == 0, aligned);
}

template <int BITS>
void choose(const Stream& job, cudaStream_t stream) {
    if (job.kind == BF16) launch<BITS, BF16>(job, stream);
    else launch<BITS, F32>(job, stream);
}

template <int KIND>
cudaError_t launch(const Nibbles& job, cudaStream_t stream) {
    constexpr int64_t SPAN = THREADS * TOGETHER * RUN_OF<KIND>;
    const int64_t blocks = (job.count + SPAN - 1) / SPAN;
    if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
    int shift = 0;
    while (((int64_t)1 << shift) < job.block) ++shift;
    const bool aligned = (uintptr_t)job.out % 16 == 0 && (uintptr_t)job.bytes % 4 == 0;
    nibbles_kernel<KIND><<<(unsigned)blocks, THREADS, 0, stream>>>(job, shift, aligned);
    return cudaGetLastError();
}

}  // namespace

extern "C" {

int32_t surgery_cuda_stream(const Stream* job, cudaStream_t stream) {
    switch (job->bits) {
        case 2: choose<2>(*job, stream); break;
        case 3: choose<3>(*job, stream); break;
        case 4: choose<4>(*job, stream); break;
        case 5: choose<5>(*job, stream); break;
        case 6: choose<6>(*job, stream); break;
        case 7: choose<7>(*job, stream); break;
        default: choose<8>(*job, stream); break;
    }
    return cudaGetLastError();
}

int32_t surgery_cuda_nibbles(const Nibbles* job, cudaStream_t stream) {
    return job->kind == BF16 ? launch<BF16>(*job, stream) : launch<F32>(*job, stream);
}

}
