// Which entries stay where chance decides: SFC64 numbers of 128 rows from one state, as on the CPU.
//
// A generator gives its numbers one after the other, so a thread has one strip of 128 rows, and its speed is that of a
// chain of sums and shifts. Rooms of several models are filled side by side.
#include <cmath>

#include "thinning.cuh"

namespace surgery {

namespace {

constexpr int THREADS = 32;

struct Draws {
    const uint64_t* states[MOST_PARENTS];
    uint32_t* room[MOST_PARENTS];
    uint32_t limits[MOST_PARENTS];
};

// The largest draw whose uniform number, a multiple of 2^-24, is below a density above 0.
uint32_t limit_of(float density) {
    const double steps = std::ceil((double)density * 16777216.0);
    return steps >= 16777216.0 ? 0xFFFFFFFFu : (uint32_t)((uint64_t)steps << 8) - 1u;
}

__global__ void __launch_bounds__(THREADS) draw_kernel(const __grid_constant__ Draws draws, int64_t rows, int64_t cols) {
    const int64_t strip = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (strip * BLOCK >= rows) return;
    const int model = blockIdx.y;
    const uint64_t* state = draws.states[model] + strip * 4;
    const uint32_t limit = draws.limits[model];
    Sfc64 source = {state[0], state[1], state[2], state[3]};
    // 128 rows fill whole words.
    uint32_t* to = draws.room[model] + strip * (BLOCK / 32) * cols;
    const int64_t numel = min(rows - strip * BLOCK, (int64_t)BLOCK) * cols;
    for (int64_t begin = 0; begin < numel; begin += 32) {
        uint32_t word = 0;
#pragma unroll
        for (int k = 0; k < 32; k += 2) {
            const uint64_t next = source.next();
            if ((uint32_t)next <= limit) word |= 1u << k;
            if ((uint32_t)(next >> 32) <= limit) word |= 1u << (k + 1);
        }
        *to++ = word;
    }
}

}  // namespace

cudaError_t draw_bits(const Tasks& job, cudaStream_t stream) {
    Draws draws = {};
    unsigned models = 0;
    for (int32_t i = 1; i < job.at.count; ++i) {
        if (job.thins[i].kind != DRAWN) continue;
        draws.states[models] = job.thins[i].states;
        draws.room[models] = (uint32_t*)kept_of(job, i).stays;
        draws.limits[models++] = limit_of(job.thins[i].density);
    }
    if (!models) return cudaSuccess;
    const int64_t strips = (job.at.rows + BLOCK - 1) / BLOCK;
    draw_kernel<<<dim3((unsigned)((strips + THREADS - 1) / THREADS), models), THREADS, 0, stream>>>(draws, job.at.rows,
                                                                                                   job.at.cols);
    return cudaGetLastError();
}

}  // namespace surgery
