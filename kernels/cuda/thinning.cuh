// What stays of a difference from the base; see thinning.h of the CPU.
#pragma once
#include "../core/merge.h"
#include "../cpu/merge.h"
#include "parents.cuh"

namespace surgery {

// The IEEE quotient. Zeros, which are many here, would send the division down its slow path.
__device__ __forceinline__ float divided(float value, float by) {
    const float quotient = __fdiv_rn(value == 0.0f ? 1.0f : value, by);
    return value == 0.0f ? __fmul_rn(value, by) : quotient;
}

// A Thin of merge.h; DRAWN: `stays` has a bit for each entry of the matrix.
struct Kept {
    int32_t kind, divide;
    float low, high, density, factor;
    const uint32_t* stays;

    // Bits of `count` entries from `at` on, 1 to 32.
    __device__ __forceinline__ uint32_t bits(int64_t at, int count) const {
        if (kind != DRAWN || count < 1) return 0;
        const int shift = (int)(at & 31);
        uint32_t found = stays[at >> 5] >> shift;
        if (shift + count > 32) found |= stays[(at >> 5) + 1] << (32 - shift);
        return found;
    }

    template <int COUNT>
    __device__ __forceinline__ void thin(float* delta, uint32_t stays) const {
        if (kind == NOTHING) {
#pragma unroll
            for (int c = 0; c < COUNT; ++c) delta[c] = __fmul_rn(delta[c], 0.0f);
        } else if (kind == BETWEEN) {
#pragma unroll
            for (int c = 0; c < COUNT; ++c) {
                const float size = fabsf(delta[c]);
                delta[c] = __fmul_rn(delta[c], size >= low && size <= high ? 1.0f : 0.0f);
            }
        } else if (kind == DRAWN) {
#pragma unroll
            for (int c = 0; c < COUNT; ++c) delta[c] = __fmul_rn(delta[c], stays >> c & 1 ? 1.0f : 0.0f);
            if (divide) {
#pragma unroll
                for (int c = 0; c < COUNT; ++c) delta[c] = divided(delta[c], density);
            }
        }
        if (factor == 1.0f) return;
#pragma unroll
        for (int c = 0; c < COUNT; ++c) delta[c] = __fmul_rn(delta[c], factor);
    }
};

inline Kept kept_of(const Tasks& job, int32_t parent) {
    const Thin& thin = job.thins[parent];
    const int64_t words = (job.at.rows * job.at.cols + 31) / 32;
    const uint32_t* stays = thin.kind == DRAWN ? job.drawn + (parent - 1) * words : nullptr;
    return {thin.kind, thin.divide, thin.low, thin.high, thin.density, thin.factor, stays};
}

// Fills the room of every DRAWN thinning.
cudaError_t draw_bits(const Tasks& job, cudaStream_t stream);

}  // namespace surgery
