// Blocks to absmax and NF4 codes (ToNibbles of ../core/encode.h) on CUDA; the C interface of kernels/cpu/entry.cpp,
// with a stream.
//
// A lane has eight values, as many lanes as a block has octets find its absmax by shuffles. Instead of 15 comparisons
// one is enough: -1 .. 1 is cut into 32 slots of equal width, narrower than the borders are apart, and lane s knows
// slot s: the border in it, and how many lie below. Which slot a value falls in need not be exact, as slots of values
// and of borders are found by the same monotonous function. Built with -fmad=false.
#include <cuda_runtime.h>

#include "../core/encode.h"
#include "eight.cuh"

using namespace surgery;

namespace {

constexpr int THREADS = 256, TOGETHER = 4, TIMES = 4;
constexpr int64_t SPAN = (int64_t)THREADS * OCTET * TOGETHER;  // of a thread block at a time

// 1 to 31 for -1 to 1 and what rounding adds to them.
__device__ __forceinline__ int slot(float scaled) { return (int)(bits_of(__fmaf_rn(scaled, 15.25f, 12582928.0f)) & 31); }

struct Slot {
    float border;
    int32_t below;
};

__device__ __forceinline__ Slot own_slot(const ToNibbles& job) {
    const int lane = threadIdx.x % 32;
    Slot mine{2.0f, 0};
#pragma unroll
    for (int k = 0; k < 15; ++k) {
        const int its = slot(job.borders[k]);
        if (its == lane) mine.border = job.borders[k];
        mine.below += its < lane ? 1 : 0;
    }
    return mine;
}

// The codes of eight values as four bytes, the first of two in the high nibble; all lanes take part. `divided`:
// those of a shorter last block, of which `count` are there. NaN and infinity are left to comparisons.
__device__ __forceinline__ uint32_t eight_codes(const ToNibbles& job, const Slot& mine, const float* v, float absmax,
                                                bool divided, int64_t count) {
    const float by = raised(absmax), inverse = __fdiv_rn(1.0f, by);
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < OCTET; ++i) {
        const float scaled = __fmul_rn(v[i], inverse);
        const int its = slot(scaled);
        const float border = __shfl_sync(ALL, mine.border, its);
        const uint32_t code = __shfl_sync(ALL, mine.below, its) + (scaled > border ? 1 : 0);
        found += code << 4 * (i ^ 1);
    }
    if (divided || !(absmax < float_of(0x7F800000u))) {
        found = 0;
#pragma unroll
        for (int i = 0; i < OCTET; ++i) {
            const float scaled = i >= count ? 0.0f : divided ? __fdiv_rn(v[i], by) : __fmul_rn(v[i], inverse);
            found |= (uint32_t)borders_below(scaled, job.borders) << 4 * (i ^ 1);
        }
    }
    return found;
}

__device__ __forceinline__ float largest_of(const float* v) {
    float found = 0.0f;
#pragma unroll
    for (int i = 0; i < OCTET; ++i) found = larger(found, fabsf(v[i]));
    return found;
}

__device__ __forceinline__ void store_eight(const ToNibbles& job, int64_t at, uint32_t codes) {
    const int64_t count = job.count - at;
    if (count >= OCTET) {
        __stcs((uint32_t*)(job.bytes + at / 2), codes);
        return;
    }
    for (int i = 0; 2 * i < count; ++i) job.bytes[at / 2 + i] = (uint8_t)(codes >> 8 * i);
}

// Blocks of 2^shift values, up to 256, on 2^(shift - 3) lanes.
template <int KIND>
__global__ void __launch_bounds__(THREADS)
    short_kernel(const __grid_constant__ ToNibbles job, int shift, bool aligned) {
    const Slot mine = own_slot(job);
    const int lanes = 1 << (shift - 3);
#pragma unroll 1
    for (int t = 0; t < TIMES; ++t) {
        const int64_t base = ((int64_t)blockIdx.x * TIMES + t) * SPAN + threadIdx.x * OCTET;
        if (base - threadIdx.x % 32 * OCTET >= job.count) return;
        Eight<KIND> raw[TOGETHER];
        float v[TOGETHER][OCTET], absmax[TOGETHER];
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r) {
            const int64_t at = base + r * THREADS * OCTET;
            raw[r].load(job.values, at, job.count - at, aligned);
        }
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r) {
            raw[r].values(v[r]);
            absmax[r] = largest_of(v[r]);
        }
        for (int m = 1; m < lanes; m *= 2) {
#pragma unroll
            for (int r = 0; r < TOGETHER; ++r) absmax[r] = larger(absmax[r], __shfl_xor_sync(ALL, absmax[r], m));
        }
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r) {
            const int64_t at = base + r * THREADS * OCTET, block = at >> shift;
            const bool whole = (block + 1) << shift <= job.count;
            const uint32_t codes = eight_codes(job, mine, v[r], absmax[r], !whole, job.count - at);
            if (at >= job.count) continue;
            store_eight(job, at, codes);
            if (threadIdx.x % lanes == 0) job.absmax[block] = whole ? absmax[r] : raised(absmax[r]);
        }
    }
}

// Longer blocks, a warp each, which reads its own twice.
template <int KIND>
__global__ void __launch_bounds__(THREADS)
    long_kernel(const __grid_constant__ ToNibbles job, bool aligned) {
    const Slot mine = own_slot(job);
    const int64_t block = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const int64_t start = block * job.block, end = min(start + job.block, job.count);
    if (start >= job.count) return;
    float absmax = 0.0f;
    for (int64_t at = start + threadIdx.x % 32 * OCTET; at < end; at += 32 * OCTET) {
        Eight<KIND> raw;
        float v[OCTET];
        raw.load(job.values, at, end - at, aligned, true);
        raw.values(v);
        absmax = larger(absmax, largest_of(v));
    }
#pragma unroll
    for (int m = 1; m < 32; m *= 2) absmax = larger(absmax, __shfl_xor_sync(ALL, absmax, m));
    const bool whole = end - start == job.block;
    if (threadIdx.x % 32 == 0) job.absmax[block] = whole ? absmax : raised(absmax);
    for (int64_t from = start; from < end; from += 32 * OCTET) {
        const int64_t at = from + threadIdx.x % 32 * OCTET;
        Eight<KIND> raw;
        float v[OCTET];
        raw.load(job.values, at, end - at, aligned);
        raw.values(v);
        const uint32_t codes = eight_codes(job, mine, v, absmax, !whole, end - at);
        if (at < end) store_eight(job, at, codes);
    }
}

template <int KIND>
cudaError_t launch(const ToNibbles& job, cudaStream_t stream) {
    const bool aligned = (uintptr_t)job.values % 16 == 0;
    int shift = 3;
    while (((int64_t)1 << shift) < job.block) ++shift;
    const bool brief = job.block <= 32 * OCTET;
    const int64_t span = brief ? SPAN * TIMES : job.block * (THREADS / 32);
    const int64_t blocks = (job.count + span - 1) / span;
    if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
    if (brief) short_kernel<KIND><<<(unsigned)blocks, THREADS, 0, stream>>>(job, shift, aligned);
    else long_kernel<KIND><<<(unsigned)blocks, THREADS, 0, stream>>>(job, aligned);
    return cudaGetLastError();
}

}  // namespace

extern "C" int32_t surgery_cuda_to_nibbles(const ToNibbles* job, cudaStream_t stream) {
    return job->kind == BF16 ? launch<BF16>(*job, stream) : launch<F32>(*job, stream);
}
