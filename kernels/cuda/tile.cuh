// A 128 x 128 block on 512 threads, each with runs of COUNT neighbours, one below the other; and its codes.
#pragma once
#include "e4m3.cuh"

namespace surgery {

constexpr int TILE_THREADS = 512;
constexpr int RUN = 16;  // neighbours of a thread in weighted sums

// Where a thread's first run lies; the others follow STRIDE rows below one another.
template <int COUNT>
struct Place {
    static constexpr int LANES = BLOCK / COUNT, STRIDE = TILE_THREADS / LANES, RUNS = BLOCK / STRIDE;
    int64_t at, step, row;
    int32_t count;  // values of a run inside the matrix, 0 .. COUNT
    int32_t rows;   // rows from the first run on
    bool aligned;

    __device__ __forceinline__ Place(int64_t block, int64_t rows_, int64_t cols, int64_t across, bool aligned_) {
        const int64_t down = block / across, col = (block - down * across) * BLOCK + threadIdx.x % LANES * COUNT;
        row = down * BLOCK + threadIdx.x / LANES;
        at = row * cols + col;
        step = cols * STRIDE;
        count = (int32_t)max((int64_t)0, min(cols - col, (int64_t)COUNT));
        rows = (int32_t)max((int64_t)0, min(rows_ - row, (int64_t)BLOCK));
        aligned = aligned_;
    }

    __device__ __forceinline__ int64_t run(int r) const { return at + r * step; }
    __device__ __forceinline__ int32_t values(int r) const { return r * STRIDE < rows ? count : 0; }
    __device__ __forceinline__ bool whole(int r) const { return aligned && values(r) == COUNT; }
};

// The largest magnitude of a warp, as bits: they order as magnitudes do. Infinity counts, NaN does not.
template <int VALUES>
__device__ __forceinline__ uint32_t largest(const float* values) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) most = fmaxf(most, fabsf(values[i]));
    return __reduce_max_sync(~0u, bits_of(most));
}

template <int VALUES>
__device__ __forceinline__ uint32_t largest_finite(const float* values) {
    int32_t most = 0;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) most = max(most, finite_magnitude(values[i]));
    return __reduce_max_sync(~0u, (uint32_t)most);
}

// Values to quotients, and their scale.
template <int VALUES>
__device__ __forceinline__ float divide(float* values, float amax, bool ue8m0) {
    const float scale = block_scale(amax, ue8m0);
    // Both sides times the same power of two, exact where the quotient is not far below code 1.
    const float factor = scale < 0x1p-60f ? 0x1p100f : scale > 0x1p60f ? 0x1p-64f : 1.0f;
    if (factor != 1.0f) {
#pragma unroll
        for (int i = 0; i < VALUES; ++i) values[i] = __fmul_rn(values[i], factor);
    }
    const Reciprocal reciprocal(__fmul_rn(scale, factor));
#pragma unroll
    for (int i = 0; i < VALUES; ++i) values[i] = reciprocal.times(values[i]);
    return scale;
}

// The same of a whole block; every thread calls it once.
template <int VALUES>
__device__ __forceinline__ float divide_block(float* values, bool ue8m0) {
    constexpr int WARPS = TILE_THREADS / 32;
    __shared__ uint32_t found[WARPS], finite[WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t most = largest<VALUES>(values);
    if (lane == 0) found[warp] = most;
    __syncthreads();
    most = __reduce_max_sync(~0u, found[lane % WARPS]);
    if (most >= 0x7F800000u) {
        most = largest_finite<VALUES>(values);
        if (lane == 0) finite[warp] = most;
        __syncthreads();
        most = __reduce_max_sync(~0u, finite[lane % WARPS]);
    }
    return divide<VALUES>(values, float_of(most), ue8m0);
}

}  // namespace surgery
