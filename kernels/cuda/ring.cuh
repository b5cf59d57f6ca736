// Blocks of matrices on their way from global to shared memory while earlier ones are worked on.
//
// A warp fills its own slots and reads them itself, so that no barrier is needed. Lane l of a run has columns
// 16 (l % 8) .. + 15 of row l / 8 of the warp's four rows. Copies are made 16 bytes at a time in the order of addresses;
// where a lane's 16 values take several such chunks, chunk i of lane l lies 8 i behind its row's first, its place
// flipped so that neither side meets a bank of shared memory twice.
#pragma once
#include <cuda_runtime.h>

#include "../core/bits.h"

namespace surgery {

constexpr int RUN = 16, WARP = 32, ROW_LANES = 8, WARP_ROWS = WARP / ROW_LANES;

// Bytes of a value, which is also the number of 16-byte chunks of a run.
template <int KIND>
constexpr int SIZE_OF = KIND == FP8_BLOCK ? 1 : KIND == BF16 ? 2 : 4;

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

// Where chunk `i` of row `row`'s lane `q` lies in a slot, in chunks.
template <int SIZE>
__device__ __forceinline__ int chunk_place(int row, int q, int i) {
    return (row * SIZE + i) * ROW_LANES + (q ^ i * (ROW_LANES / SIZE));
}

// RUNS runs of a warp, `step` rows apart, into as many places one after the other; zeros outside of the matrix.
// `from`: the warp's first value; `rows`, `cols`: what is left of the matrix from there on; `pitch`: bytes of a row.
template <int KIND, int RUNS>
__device__ __forceinline__ void fetch_runs(uint4* into, const uint8_t* from, int64_t pitch, int step, int rows, int cols) {
    constexpr int SIZE = SIZE_OF<KIND>, ACROSS = ROW_LANES * SIZE, DOWN = WARP / ACROSS;
    const int lane = threadIdx.x % WARP, row = lane / ACROSS, chunk = lane % ACROSS;
    const bool inside = chunk / SIZE * RUN < cols;
    from += row * pitch + chunk * 16;
    const uint32_t place = (uint32_t)__cvta_generic_to_shared(into + chunk_place<SIZE>(row, chunk / SIZE, chunk % SIZE));
#pragma unroll
    for (int r = 0; r < RUNS; ++r)
#pragma unroll
        for (int i = 0; i < SIZE; ++i)
            copy16(place + (r * SIZE * WARP + i * WARP) * 16, from + (r * step + i * DOWN) * pitch,
                   inside && r * step + i * DOWN + row < rows);
}

// The same value by value, where rows are not aligned to 16 bytes.
template <int KIND, int RUNS>
__device__ __forceinline__ void gather_runs(uint4* into, const uint8_t* from, int64_t pitch, int step, int rows, int cols) {
    constexpr int SIZE = SIZE_OF<KIND>;
    const int lane = threadIdx.x % WARP, row = lane / ROW_LANES, q = lane % ROW_LANES;
#pragma unroll 1
    for (int n = 0; n < RUNS * SIZE; ++n) {
        const int r = n / SIZE, i = n % SIZE, down = r * step + row;
        const uint8_t* run = from + down * pitch + q * RUN * SIZE;
        uint32_t words[4] = {};
#pragma unroll
        for (int k = 0; k < RUN / SIZE; ++k) {
            const int value = i * (RUN / SIZE) + k;
            if (down >= rows || q * RUN + value >= cols) continue;
            if (KIND == FP8_BLOCK) words[k / 4] |= (uint32_t)run[value] << 8 * (k % 4);
            if (KIND == BF16) words[k / 2 % 4] |= (uint32_t)((const uint16_t*)run)[value] << 16 * (k % 2);
            if (KIND == F32) words[k % 4] = ((const uint32_t*)run)[value];
        }
        into[r * SIZE * WARP + chunk_place<SIZE>(row, q, i)] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

}  // namespace surgery
