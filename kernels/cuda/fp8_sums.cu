// Weighted sums of FP8 parents on CUDA, to FP8 blocks or bf16.
//
// A thread block works through 128 x 128 blocks, one after the other, while the next ones are on their way to shared
// memory (ring.cuh). A block's values stay in registers between its amax and its codes, hence one pass. Built with
// -fmad=false: products and sums are rounded one by one, as on the CPU.
#include "fp8_sums.h"

#include <algorithm>

#include "ring.cuh"
#include "store.cuh"
#include "tile.cuh"

namespace surgery {

namespace {

constexpr int MOST_PARENTS = 16, LANES = 2;
constexpr uint32_t ALL = ~0u, INFINITE = 0x7F800000u;

// OUTPUT: the kind of the result. SQUARES: with sums. JOINT: 2 where there are two parents, taken together, else 1;
// the first is then kept for the sums. The sizes are the fastest of those tried on an H200.
template <int OUTPUT_, bool SQUARES_, int JOINT_>
struct Form {
    static constexpr int OUTPUT = OUTPUT_, JOINT = JOINT_;
    static constexpr bool SQUARES = SQUARES_, HALVES = JOINT == 1 && !SQUARES;
    // bf16 needs no barrier, so each thread block takes one block and leaves the rest to the scheduler.
    static constexpr bool RING = OUTPUT == FP8_BLOCK;
    static constexpr int THREADS = HALVES ? 256 : 512, WARPS = THREADS / WARP;
    static constexpr int RESIDENT = HALVES || !RING ? 2 : 1;  // thread blocks of a multiprocessor
    static constexpr int STRIDE = THREADS / ROW_LANES, RUNS = BLOCK / STRIDE, VALUES = RUNS * RUN;
    // Bytes of a warp's slot: its runs of JOINT parents, and their scales.
    static constexpr int SLOTS = RING ? 3 : 1, CODES = JOINT * RUNS * WARP * 16, SLOT = CODES + 16;
    static constexpr int KEPT = SQUARES && JOINT == 1 ? VALUES : 1;
    static constexpr int ADDED = !SQUARES ? 1 : JOINT == 1 ? MOST_PARENTS : JOINT;
};

struct Job {
    const uint8_t* values[MOST_PARENTS];
    const float* scales[MOST_PARENTS];
    float weights[MOST_PARENTS];
    void* out;
    float* out_scales;
    double* sums;
    int64_t rows, cols;
    int32_t count, down, across;     // parents; blocks
    int32_t step_down, step_across;  // from one block of a thread block to its next
    int32_t slots;
    bool ue8m0;
};

// Which block.
struct Spot {
    int32_t down, across;

    __device__ __forceinline__ explicit Spot(const Job& job)
        : down(blockIdx.x / (uint32_t)job.across), across(blockIdx.x % (uint32_t)job.across) {}

    __device__ __forceinline__ void step(const Job& job) {
        down += job.step_down;
        across += job.step_across;
        if (across >= job.across) across -= job.across, ++down;
    }

    __device__ __forceinline__ int64_t block(const Job& job) const { return (int64_t)down * job.across + across; }
};

// What is fetched next: parents from this one on.
struct Ahead {
    Spot spot;
    int32_t parent;
};

// Always ends a group of copies, so that those to come can be counted.
template <class F>
__device__ __forceinline__ void fetch(const Job& job, Ahead& ahead, uint8_t* slot) {
    if (ahead.spot.down < job.down) {
        const int64_t row = (int64_t)ahead.spot.down * BLOCK + threadIdx.x / WARP * WARP_ROWS;
        const int64_t col = (int64_t)ahead.spot.across * BLOCK;
        const int rows = (int)min(job.rows - row, (int64_t)BLOCK), cols = (int)min(job.cols - col, (int64_t)BLOCK);
#pragma unroll
        for (int j = 0; j < F::JOINT; ++j)
            fetch_runs<F::RUNS>((uint4*)slot + j * F::RUNS * WARP, job.values[ahead.parent + j] + row * job.cols + col,
                                job.cols, F::STRIDE, rows, cols);
        if (threadIdx.x % WARP == 0) {
            const uint32_t scales = (uint32_t)__cvta_generic_to_shared(slot + F::CODES);
#pragma unroll
            for (int j = 0; j < F::JOINT; ++j)
                copy4(scales + 4 * j, job.scales[ahead.parent + j] + ahead.spot.block(job));
        }
        ahead.parent += F::JOINT;
        if (F::JOINT > 1 || ahead.parent == job.count) ahead.parent = 0, ahead.spot.step(job);
    }
    end_copies();
}

// What a thread keeps of a block.
template <class F>
struct Tile {
    float total[F::VALUES];
    float base[F::KEPT];
    double square[F::JOINT][LANES];
};

// A slot's parents to the totals.
template <class F>
__device__ __forceinline__ void add_parents(Tile<F>& tile, const uint8_t* slot, const float* weight, bool first) {
    constexpr int JOINT = F::JOINT;
    float scale[JOINT];
#pragma unroll
    for (int j = 0; j < JOINT; ++j) scale[j] = ((const float*)(slot + F::CODES))[j];
#pragma unroll
    for (int r = 0; r < F::RUNS; ++r) {
        uint4 chunk[JOINT];
#pragma unroll
        for (int j = 0; j < JOINT; ++j) chunk[j] = ((const uint4*)slot)[(j * F::RUNS + r) * WARP + threadIdx.x % WARP];
#pragma unroll
        for (int g = 0; g < 4; ++g) {
            float kept[4];
#pragma unroll
            for (int j = 0; j < JOINT; ++j) {
                const uint32_t words[4] = {chunk[j].x, chunk[j].y, chunk[j].z, chunk[j].w};
                float value[4];
                unpack4(words[g], value);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int at = r * RUN + 4 * g + k;
                    const float v = __fmul_rn(value[k], scale[j]);
                    if (F::SQUARES) {
                        float& base = JOINT > 1 ? kept[k] : tile.base[at % F::KEPT];
                        const bool is_base = JOINT > 1 ? j == 0 : first;
                        if (is_base) base = v;
                        const double gap = is_base ? v : __fsub_rn(base, v);
                        tile.square[j][k % LANES] = __fma_rn(gap, gap, tile.square[j][k % LANES]);
                    }
                    const float term = __fmul_rn(v, weight[j]);
                    const float sum = JOINT > 1 && j == 0 ? term : __fadd_rn(tile.total[at], term);
                    tile.total[at] = F::SQUARES && JOINT == 1 && weight[j] == 0.0f ? tile.total[at] : sum;
                }
            }
        }
    }
}

// A warp's sums of squares, each in its lane 0.
template <class F>
__device__ __forceinline__ void add_lanes(double (*square)[LANES], double (*into)[F::WARPS]) {
#pragma unroll
    for (int j = 0; j < F::JOINT; ++j) {
        double sum = square[j][0] + square[j][1];
#pragma unroll
        for (int lane = WARP / 2; lane; lane /= 2) sum += __shfl_xor_sync(ALL, sum, lane);
        if (threadIdx.x % WARP == 0) into[j][threadIdx.x / WARP] = sum;
    }
}

template <class F>
__global__ void __launch_bounds__(F::THREADS, F::RESIDENT) sum_kernel(const __grid_constant__ Job job) {
    constexpr int WARPS = F::WARPS;
    extern __shared__ uint4 space[];
    // Two of each by turns: one barrier per block keeps the next block's writes from this one's reads.
    __shared__ uint32_t found[2][WARPS], again[WARPS];
    __shared__ double added[2][F::ADDED][WARPS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    uint8_t* const ring = (uint8_t*)space + warp * (job.slots * F::SLOT);
    Spot spot(job);
    Ahead ahead{spot, 0};
#pragma unroll 1
    for (int s = 0; s < job.slots; ++s) fetch<F>(job, ahead, ring + s * F::SLOT);
    int slot = 0, turn = 0;
#pragma unroll 1
    for (; spot.down < job.down; spot.step(job), turn ^= 1) {
        Tile<F> tile;
        // -0 + x is x for every x, zeros and their signs included.
#pragma unroll
        for (int i = 0; i < F::VALUES; ++i) tile.total[i] = -0.0f;
        const int32_t count = F::JOINT > 1 ? F::JOINT : job.count;
#pragma unroll 1
        for (int32_t p = 0; p < count; p += F::JOINT) {
            float weight[F::JOINT];
#pragma unroll
            for (int j = 0; j < F::JOINT; ++j) {
                tile.square[j][0] = tile.square[j][1] = 0.0;
                weight[j] = job.weights[p + j];
            }
            uint8_t* here = ring + slot * F::SLOT;
            await_copies(job.slots - 1);
            __syncwarp();
            add_parents<F>(tile, here, weight, p == 0);
            __syncwarp();
            fetch<F>(job, ahead, here);
            slot = slot + 1 == job.slots ? 0 : slot + 1;
            if (F::SQUARES) add_lanes<F>(tile.square, added[turn] + p % F::ADDED);
        }
        if (F::OUTPUT == FP8_BLOCK) {
            const uint32_t most = largest<F::VALUES>(tile.total);
            if (lane == 0) found[turn][warp] = most;
            __syncthreads();
        }
        const int64_t block = spot.block(job);
        if (F::SQUARES) {
            for (int32_t p = warp; p < job.count; p += WARPS) {
                double sum = added[turn][p % F::ADDED][lane % WARPS];
#pragma unroll
                for (int step = WARPS / 2; step; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
                if (lane == 0) job.sums[block * job.count + p] = sum;
            }
        }
        if (F::OUTPUT == FP8_BLOCK) {
            uint32_t most = __reduce_max_sync(ALL, found[turn][lane % WARPS]);
            if (most >= INFINITE) {
                most = largest_finite<F::VALUES>(tile.total);
                if (lane == 0) again[warp] = most;
                __syncthreads();
                most = __reduce_max_sync(ALL, again[lane % WARPS]);
            }
            const float scale = divide<F::VALUES>(tile.total, float_of(most), job.ue8m0);
            if (threadIdx.x == 0) job.out_scales[block] = scale;
        }
        const int64_t row = (int64_t)spot.down * BLOCK + threadIdx.x / ROW_LANES;
        const int64_t col = (int64_t)spot.across * BLOCK + threadIdx.x % ROW_LANES * RUN;
#pragma unroll
        for (int r = 0; r < F::RUNS; ++r)
            if (row + r * F::STRIDE < job.rows && col < job.cols)
                store<F::OUTPUT, RUN>(job.out, (row + r * F::STRIDE) * job.cols + col, RUN, true, tile.total + r * RUN);
    }
}

template <class F>
cudaError_t launch(Job job, cudaStream_t stream) {
    const auto kernel = sum_kernel<F>;
    constexpr int ONE = F::WARPS * F::SLOT;
    int device = 0, processors = 0, most_shared = 0, resident = 0;
    cudaFuncAttributes own;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&own, kernel);
    if (status != cudaSuccess) return status;
    most_shared = (most_shared - 1024 * (F::RESIDENT - 1)) / F::RESIDENT - (int)own.sharedSizeBytes;
    job.slots = std::max(1, std::min(F::SLOTS, most_shared / ONE));
    const int shared = job.slots * ONE;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status == cudaSuccess)
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, F::THREADS, shared);
    if (status != cudaSuccess) return status;
    const int64_t blocks = (int64_t)job.down * job.across, most = (int64_t)processors * std::max(resident, 1);
    const int32_t grid = (int32_t)(F::RING ? std::min(blocks, most) : blocks);
    job.step_down = grid / job.across;
    job.step_across = grid % job.across;
    kernel<<<(unsigned)grid, F::THREADS, shared, stream>>>(job);
    return cudaGetLastError();
}

// Whether parent `i` is there: one of weight 0 takes part in the sums of squares alone.
bool counts(const Combine& work, int32_t i) { return work.sums || work.weights[i] != 0.0f; }

}  // namespace

bool takes_fp8_sum(const Combine& work) {
    if (!work.out || work.cols % RUN != 0 || !even(work.out)) return false;
    int32_t count = 0;
    for (int32_t i = 0; i < work.count; ++i) {
        if (!counts(work, i)) continue;
        if (work.kinds[i] != FP8_BLOCK || !even(work.parents[i])) return false;
        ++count;
    }
    return work.out_kind == FP8_BLOCK ? count > 0 : work.out_kind == BF16 && count == 2 && !work.sums;
}

cudaError_t add_fp8(const Combine& work, cudaStream_t stream) {
    Job job = {};
    job.out = work.out;
    job.out_scales = work.out_scales;
    job.sums = work.sums;
    job.rows = work.rows;
    job.cols = work.cols;
    job.down = (int32_t)((work.rows + BLOCK - 1) / BLOCK);
    job.across = (int32_t)((work.cols + BLOCK - 1) / BLOCK);
    job.ue8m0 = work.ue8m0;
    bool together = true;
    for (int32_t i = 0; i < work.count; ++i) {
        if (!counts(work, i)) continue;
        job.values[job.count] = (const uint8_t*)work.parents[i];
        job.scales[job.count] = work.scales[i];
        job.weights[job.count++] = work.weights[i];
        together = together && work.weights[i] != 0.0f;
    }
    together = together && job.count == 2;
    if (work.out_kind == BF16) return launch<Form<BF16, false, 2>>(job, stream);
    if (work.sums)
        return together ? launch<Form<FP8_BLOCK, true, 2>>(job, stream) : launch<Form<FP8_BLOCK, true, 1>>(job, stream);
    return together ? launch<Form<FP8_BLOCK, false, 2>>(job, stream) : launch<Form<FP8_BLOCK, false, 1>>(job, stream);
}

}  // namespace surgery
