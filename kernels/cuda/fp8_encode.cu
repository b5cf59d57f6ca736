// One matrix of bf16 or float32 to FP8 blocks in one pass, where its rows are aligned to 16 values.
//
// One thread block takes one 128 x 128 block and holds it as it is stored, four to eight 16-byte loads a thread, all of
// them under way together. A warp loads whole lines, and stores 8 or 4 codes a lane beside its neighbour's. The amax is
// taken from the bits, so that nothing is decoded before it is known. Built with -fmad=false.
#include "fp8_encode.h"

#include "e4m3.cuh"
#include "store.cuh"

namespace surgery {

namespace {

constexpr int THREADS = 512;
constexpr int32_t FINITE = 0x00800000;

template <int KIND>
struct Form {
    static constexpr int WIDE = KIND == BF16 ? 8 : 4;  // values in 16 bytes
    static constexpr int LANES = BLOCK / WIDE, STEP = THREADS / LANES, PASSES = BLOCK / STEP;

    // The larger of `found` and the finite magnitudes of 16 bytes of values, all of them float bits plus FINITE: that
    // makes infinity and NaN negative.
    __device__ static __forceinline__ int32_t larger(int32_t found, const uint4& raw) {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            found = __viaddmax_s32((int32_t)(words[i] & (KIND == BF16 ? 0x7FFF0000u : 0x7FFFFFFFu)), FINITE, found);
            if (KIND == BF16) found = __viaddmax_s32((int32_t)(words[i] << 16 & 0x7FFF0000u), FINITE, found);
        }
        return found;
    }

    __device__ static __forceinline__ void values(const uint4& raw, float* to) {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (KIND == BF16) to[2 * i % WIDE] = float_of(words[i] << 16), to[(2 * i + 1) % WIDE] = float_of(words[i] & 0xFFFF0000u);
            else to[i] = float_of(words[i]);
        }
    }
};

template <int KIND>
__global__ void __launch_bounds__(THREADS, 2)
    encode_kernel(const void* from, uint8_t* codes, float* scales, int64_t rows, int64_t cols, int64_t across, bool ue8m0) {
    using F = Form<KIND>;
    __shared__ int32_t found[THREADS / 32];
    const int64_t down = blockIdx.x / across;
    const int64_t row = down * BLOCK + threadIdx.x / F::LANES;
    const int64_t col = (blockIdx.x - down * across) * BLOCK + threadIdx.x % F::LANES * F::WIDE;
    const int64_t at = row * cols + col;
    const int passes = col < cols ? (int)min((int64_t)F::PASSES, (rows - row + F::STEP - 1) / F::STEP) : 0;
    uint4 raw[F::PASSES];
#pragma unroll
    for (int p = 0; p < F::PASSES; ++p) {
        raw[p] = make_uint4(0, 0, 0, 0);
        if (p < passes) raw[p] = __ldcs((const uint4*)from + (at + p * (F::STEP * cols)) / F::WIDE);
    }
    int32_t largest = FINITE;
#pragma unroll
    for (int p = 0; p < F::PASSES; ++p) largest = F::larger(largest, raw[p]);
    largest = __reduce_max_sync(~0u, largest);
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = largest;
    __syncthreads();
    largest = __reduce_max_sync(~0u, found[threadIdx.x % (THREADS / 32)]);
    const float scale = block_scale(float_of((uint32_t)(largest - FINITE)), ue8m0);
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    // Both sides times the same power of two, exact where the quotient is not far below code 1.
    const float factor = scale < 0x1p-60f ? 0x1p100f : scale > 0x1p60f ? 0x1p-64f : 1.0f;
    const Reciprocal reciprocal(__fmul_rn(scale, factor));
#pragma unroll
    for (int p = 0; p < F::PASSES; ++p) {
        if (p >= passes) break;
        float v[F::WIDE];
        F::values(raw[p], v);
        if (factor != 1.0f) {
#pragma unroll
            for (int i = 0; i < F::WIDE; ++i) v[i] = __fmul_rn(v[i], factor);
        }
#pragma unroll
        for (int i = 0; i < F::WIDE; ++i) v[i] = reciprocal.times(v[i]);
        uint8_t* to = codes + at + p * (F::STEP * cols);
        if (KIND == BF16) __stcs((uint2*)to, make_uint2(pack4(v), pack4(v + F::WIDE - 4)));
        else __stcs((uint32_t*)to, pack4(v));
    }
}

}  // namespace

bool takes_encoding(const Combine& job) {
    return job.count == 1 && job.kinds[0] != FP8_BLOCK && job.out && job.out_kind == FP8_BLOCK && !job.sums &&
           job.weights[0] == 1.0f && job.cols % 16 == 0 && even(job.parents[0]) && even(job.out);
}

cudaError_t encode_fp8(const Combine& job, cudaStream_t stream) {
    const int64_t across = (job.cols + BLOCK - 1) / BLOCK;
    const unsigned blocks = (unsigned)((job.rows + BLOCK - 1) / BLOCK * across);
    const void* from = job.parents[0];
    uint8_t* codes = (uint8_t*)job.out;
    if (job.kinds[0] == BF16)
        encode_kernel<BF16><<<blocks, THREADS, 0, stream>>>(from, codes, job.out_scales, job.rows, job.cols, across, job.ue8m0);
    else
        encode_kernel<F32><<<blocks, THREADS, 0, stream>>>(from, codes, job.out_scales, job.rows, job.cols, across, job.ue8m0);
    return cudaGetLastError();
}

}  // namespace surgery
