// Grids of groups and streams of their codes (ToStream of ../core/encode.h) on CUDA; the C interface of
// kernels/cpu/entry.cpp, with a stream.
//
// Groups of 32 to 256 columns, in powers of two: each value is read once. A warp has 256 columns of four rows, eight
// columns a lane. Extremes go round by shuffles in which lanes halve what they hold, so that in the end lane l has
// those of row l mod 4 and makes its grid, and each lane gets the other rows' by shuffles.
//
// Other groups: a thread block has a row, finds its grids, and reads it again, from the L2 where it fits.
// Built with -fmad=false.
#include <cuda_runtime.h>

#include "../core/encode.h"
#include "eight.cuh"

using namespace surgery;

namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32, ROWS = 4, SPAN = 32 * OCTET;
constexpr int ROW_THREADS = 256, ROW_WARPS = ROW_THREADS / 32;

// A grid as codes are found on it. The reciprocal is NaN where a corrected quotient might not be exact.
struct Near {
    float scale, inverse, low;

    __device__ __forceinline__ explicit Near(float scale, float low) : scale(scale), low(low) {
        const bool usual = scale >= 0x1p-100f && scale <= 0x1p100f;
        inverse = usual ? __frcp_rn(scale) : float_of(0x7FC00000u);
    }
    __device__ __forceinline__ Near(float scale, float inverse, float low) : scale(scale), inverse(inverse), low(low) {}
};

// Four codes at the bottom of a word. From a correctly rounded reciprocal one correction gives the IEEE quotient
// (see sweep.cu), but for tiny ones, which are rounded to 0 all the same. Whole numbers stand in the low bits of the
// sums with 1.5 * 2^23; what those bits hold beside the codes is taken off at once.
template <int BITS>
__device__ __forceinline__ uint32_t four_codes(const float* v, const Near& grid, float top) {
    const float high = top + grid.low;
    uint32_t found = 0;
    if (grid.inverse == grid.inverse) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float near = __fmul_rn(v[i], grid.inverse);
            const float exact = __fmaf_rn(__fmaf_rn(-near, grid.scale, v[i]), grid.inverse, near);
            found += bits_of(fminf(fmaxf(exact, grid.low), high) + 12582912.0f) << BITS * i;
        }
        const uint32_t ones = 1u + (1u << BITS) + (1u << 2 * BITS) + (1u << 3 * BITS);
        return found + ((uint32_t)(int32_t)-grid.low - 0x4B400000u) * ones;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        found |= (uint32_t)grid_code(grid_offset(__fdiv_rn(v[i], grid.scale), grid.low, high), grid.low) << BITS * i;
    return found;
}

// The eight codes of each lane, four in either word, to `room` bytes from `to` on. Streams of words whose codes fill
// none go through shared memory; `even`: `to` is aligned to a lane's bytes, or to 4 of those.
template <int BITS>
__device__ __forceinline__ void store_codes(uint8_t* to, int64_t room, bool even, uint32_t low, uint32_t high,
                                            uint8_t* stage) {
    const int lane = threadIdx.x % 32;
    if (even && (BITS == 2 || BITS == 4 || BITS == 8)) {
        if ((lane + 1) * BITS > room) return;
        if (BITS == 8) __stcs((uint2*)to + lane, make_uint2(low, high));
        if (BITS == 4) __stcs((uint32_t*)to + lane, low | high << 16);
        if (BITS == 2) __stcs((uint16_t*)to + lane, (uint16_t)(low | high << 8));
        return;
    }
    const uint64_t both = (uint64_t)low | (uint64_t)high << 4 * BITS;
    __syncwarp();
#pragma unroll
    for (int k = 0; k < BITS; ++k) stage[lane * BITS + k] = (uint8_t)(both >> 8 * k);
    __syncwarp();
    const int bytes = (int)min(room, (int64_t)32 * BITS);
    if (even)
        for (int i = lane; i < bytes / 4; i += 32) __stcs((uint32_t*)to + i, ((const uint32_t*)stage)[i]);
    else
        for (int i = lane; i < bytes; i += 32) to[i] = stage[i];
}

// One value of four to each lane, that of row lane % 4, over lanes l, l ^ 1, ... of the group.
__device__ __forceinline__ float most_of_group(const float* of_rows, int lanes) {
    const int lane = threadIdx.x % 32;
    const bool upper = lane & 2, odd = lane & 1;
    float a = upper ? of_rows[2] : of_rows[0], b = upper ? of_rows[3] : of_rows[1];
    a = larger(a, __shfl_xor_sync(ALL, upper ? of_rows[0] : of_rows[2], 2));
    b = larger(b, __shfl_xor_sync(ALL, upper ? of_rows[1] : of_rows[3], 2));
    float mine = larger(odd ? b : a, __shfl_xor_sync(ALL, odd ? a : b, 1));
    for (int m = 4; m < lanes; m *= 2) mine = larger(mine, __shfl_xor_sync(ALL, mine, m));
    return mine;
}

// `lanes` of a warp, at least 4, have a group.
template <int BITS, int KIND>
__global__ void __launch_bounds__(THREADS)
    grouped_kernel(const __grid_constant__ ToStream job, int64_t chunks, int lanes, bool aligned) {
    __shared__ __align__(16) uint8_t stage[WARPS][32 * BITS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t index = (int64_t)blockIdx.x * WARPS + warp, first = index / chunks * ROWS;
    const int64_t chunk = index % chunks, col = chunk * SPAN + lane * OCTET;
    if (first >= job.rows) return;
    const bool inside = col < job.cols;
    float v[ROWS][OCTET], high[ROWS], low[ROWS];
    Eight<KIND> raw[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int64_t row = min(first + r, job.rows - 1);
        raw[r].load(job.values, row * job.cols + col, inside ? OCTET : 0, aligned);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        raw[r].values(v[r]);
        high[r] = low[r] = 0.0f;
        if (job.symmetric) {
#pragma unroll
            for (int i = 0; i < OCTET; ++i) high[r] = larger(high[r], fabsf(v[r][i]));
        } else {
#pragma unroll
            for (int i = 0; i < OCTET; ++i) high[r] = larger(high[r], v[r][i]), low[r] = larger(low[r], -v[r][i]);
        }
    }
    const float most = most_of_group(high, lanes), least = job.symmetric ? -most : -most_of_group(low, lanes);
    const GridOf grid = span_grid(least, most, job.top, job.symmetric, job.scale_kind);
    const Near mine(grid.scale, -(float)grid.zero);
    if (lane % lanes < ROWS && inside && first + lane % ROWS < job.rows) {
        const int64_t place = (first + lane % ROWS) * job.groups + col / job.width;
        job.scales[place] = grid.scale;
        job.zeros[place] = (uint8_t)grid.zero;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int from = (lane & ~(ROWS - 1)) | r;
        const Near its(__shfl_sync(ALL, mine.scale, from), __shfl_sync(ALL, mine.inverse, from),
                       __shfl_sync(ALL, mine.low, from));
        if (first + r >= job.rows) break;
        const uint32_t one = four_codes<BITS>(v[r], its, (float)job.top);
        const uint32_t two = four_codes<BITS>(v[r] + 4, its, (float)job.top);
        uint8_t* to = job.stream + (first + r) * job.row_bytes + chunk * (32 * BITS);
        store_codes<BITS>(to, job.row_bytes - chunk * (32 * BITS), true, one, two, stage[warp]);
    }
}

// The grids of a row, by warps or, where there are few, by all of the thread block.
template <int KIND>
__device__ __forceinline__ void row_grids(const ToStream& job, int64_t row, bool aligned) {
    __shared__ float highs[ROW_WARPS], lows[ROW_WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool together = job.groups < ROW_WARPS;
    const int self = together ? threadIdx.x : lane, step = together ? ROW_THREADS : 32;
    for (int64_t g = together ? 0 : warp; g < job.groups; g += together ? 1 : ROW_WARPS) {
        const int64_t start = row * job.cols + g * job.width;
        float high = 0.0f, low = 0.0f;
        if (aligned && job.width % OCTET == 0) {
#pragma unroll 4
            for (int64_t c = (int64_t)self * OCTET; c < job.width; c += step * OCTET) {
                Eight<KIND> raw;
                float v[OCTET];
                raw.load(job.values, start + c, OCTET, true, true);
                raw.values(v);
#pragma unroll
                for (int i = 0; i < OCTET; ++i) high = larger(high, v[i]), low = larger(low, -v[i]);
            }
        } else {
            for (int64_t c = self; c < job.width; c += step) {
                const float v = one_value<KIND>(job.values, start + c);
                high = larger(high, v), low = larger(low, -v);
            }
        }
#pragma unroll
        for (int m = 1; m < 32; m *= 2) {
            high = larger(high, __shfl_xor_sync(ALL, high, m));
            low = larger(low, __shfl_xor_sync(ALL, low, m));
        }
        if (together) {
            if (lane == 0) highs[warp] = high, lows[warp] = low;
            __syncthreads();
#pragma unroll
            for (int w = 0; w < ROW_WARPS; ++w) high = larger(high, highs[w]), low = larger(low, lows[w]);
            __syncthreads();
        }
        if (self == 0) {
            const GridOf grid = span_grid(-low, high, job.top, job.symmetric, job.scale_kind);
            job.scales[row * job.groups + g] = grid.scale;
            job.zeros[row * job.groups + g] = (uint8_t)grid.zero;
        }
    }
    __syncthreads();
}

// `stored`: the stream's rows are aligned to a lane's bytes or to 4 of those.
template <int BITS, int KIND>
__global__ void __launch_bounds__(ROW_THREADS)
    row_kernel(const __grid_constant__ ToStream job, bool aligned, bool stored) {
    __shared__ __align__(16) uint8_t stage[ROW_WARPS][32 * BITS];
    const int64_t row = blockIdx.x;
    row_grids<KIND>(job, row, aligned);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const volatile float* scales = job.scales + row * job.groups;
    const volatile uint8_t* zeros = job.zeros + row * job.groups;
    for (int64_t chunk = warp; chunk * (32 * BITS) < job.row_bytes; chunk += ROW_WARPS) {
        const int64_t col = chunk * SPAN + lane * OCTET, count = job.cols - col;
        uint32_t words[2] = {0, 0};
        if (count >= OCTET && job.width % OCTET == 0) {
            Eight<KIND> raw;
            float v[OCTET];
            raw.load(job.values, row * job.cols + col, OCTET, aligned);
            raw.values(v);
            const int64_t group = col / job.width;
            const Near grid(scales[group], -(float)zeros[group]);
            words[0] = four_codes<BITS>(v, grid, (float)job.top);
            words[1] = four_codes<BITS>(v + 4, grid, (float)job.top);
        } else {
#pragma unroll
            for (int i = 0; i < OCTET; ++i) {
                if (i >= count) continue;
                const int64_t group = (col + i) / job.width;
                const float low = -(float)zeros[group], v = one_value<KIND>(job.values, row * job.cols + col + i);
                const float offset = grid_offset(__fdiv_rn(v, scales[group]), low, (float)job.top + low);
                words[i / 4] |= (uint32_t)grid_code(offset, low) << i % 4 * BITS;
            }
        }
        uint8_t* to = job.stream + row * job.row_bytes + chunk * (32 * BITS);
        store_codes<BITS>(to, job.row_bytes - chunk * (32 * BITS), stored, words[0], words[1], stage[warp]);
    }
}

template <int BITS, int KIND>
cudaError_t launch(const ToStream& job, cudaStream_t stream) {
    const bool aligned = job.cols % OCTET == 0 && (uintptr_t)job.values % 16 == 0;
    int lanes = 4;
    while (lanes * OCTET < job.width && lanes < 32) lanes *= 2;
    if (lanes * OCTET == job.width) {
        const int64_t chunks = (job.cols + SPAN - 1) / SPAN, warps = (job.rows + ROWS - 1) / ROWS * chunks;
        const int64_t blocks = (warps + WARPS - 1) / WARPS;
        if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
        grouped_kernel<BITS, KIND><<<(unsigned)blocks, THREADS, 0, stream>>>(job, chunks, lanes, aligned);
        return cudaGetLastError();
    }
    if (job.rows > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
    const bool stored = job.row_bytes % (BITS == 8 ? 8 : 4) == 0;
    row_kernel<BITS, KIND><<<(unsigned)job.rows, ROW_THREADS, 0, stream>>>(job, aligned, stored);
    return cudaGetLastError();
}

template <int BITS>
cudaError_t choose(const ToStream& job, cudaStream_t stream) {
    return job.kind == BF16 ? launch<BITS, BF16>(job, stream) : launch<BITS, F32>(job, stream);
}

}  // namespace

extern "C" int32_t surgery_cuda_to_stream(const ToStream* job, cudaStream_t stream) {
    switch (job->bits) {
        case 2: return choose<2>(*job, stream);
        case 3: return choose<3>(*job, stream);
        case 4: return choose<4>(*job, stream);
        case 5: return choose<5>(*job, stream);
        case 6: return choose<6>(*job, stream);
        case 7: return choose<7>(*job, stream);
        default: return choose<8>(*job, stream);
    }
}
