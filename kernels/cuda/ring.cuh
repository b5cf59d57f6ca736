// FP8 blocks on their way from global to shared memory while earlier ones are worked on.
//
// A warp fills its own slots and reads them itself, so that no barrier is needed. Lane l of a run has columns
// 16 (l % 8) .. + 15 of row l / 8 of the warp's four rows.
#pragma once
#include <cuda_runtime.h>

#include "../core/bits.h"

namespace surgery {

constexpr int WARP = 32, ROW_LANES = 8, WARP_ROWS = WARP / ROW_LANES;

__device__ __forceinline__ void copy16(uint32_t into, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(into), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy4(uint32_t into, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(into), "l"(from) : "memory");
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `later` groups of copies are under way, 0 to 2.
__device__ __forceinline__ void await_copies(int later) {
    if (later == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
    else if (later == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
    else asm volatile("cp.async.wait_group 2;" ::: "memory");
}

// RUNS runs of a warp, `step` rows apart, into as many places one after the other; zeros outside of the matrix.
// `from`: the warp's first code; `rows`, `cols`: what is left of the matrix from there on, cols in whole runs.
template <int RUNS>
__device__ __forceinline__ void fetch_runs(uint4* into, const uint8_t* from, int64_t pitch, int step, int rows, int cols) {
    const int lane = threadIdx.x % WARP, row = lane / ROW_LANES, q = lane % ROW_LANES;
    const bool inside = q * 16 < cols;
    from += row * pitch + q * 16;
    const uint32_t place = (uint32_t)__cvta_generic_to_shared(into + lane);
#pragma unroll
    for (int r = 0; r < RUNS; ++r)
        copy16(place + r * WARP * 16, from + r * step * pitch, inside && r * step + row < rows);
}

}  // namespace surgery
