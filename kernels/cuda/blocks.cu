// Weighted sums and FP8 blocks on CUDA; the C interface of kernels/cpu/entry.cpp, with a stream.
//
// A thread block works through 128 x 128 blocks, one after the other, while the next ones are on their way to shared
// memory (ring.cuh). A block's values stay in registers between its amax and its codes, hence one pass. Built with
// -fmad=false: products and sums are rounded one by one, as on the CPU.
#include <algorithm>

#include "../cpu/blocks.h"
#include "e4m3.cuh"
#include "ring.cuh"
#include "store.cuh"

using namespace surgery;

namespace {

#ifndef SURGERY_THREADS
#define SURGERY_THREADS 512
#endif
#ifndef SURGERY_RESIDENT
#define SURGERY_RESIDENT 2
#endif
#ifndef SURGERY_SQUARES_RESIDENT
#define SURGERY_SQUARES_RESIDENT 1
#endif
#ifndef SURGERY_SLOTS
#define SURGERY_SLOTS 3
#endif

constexpr int THREADS = SURGERY_THREADS, WARPS = THREADS / WARP, STRIDE = THREADS / ROW_LANES, RUNS = BLOCK / STRIDE;
constexpr int MOST_SLOTS = SURGERY_SLOTS, MOST_PARENTS = 16, LANES = 2;
// Thread blocks of a multiprocessor.
template <bool SQUARES>
constexpr int RESIDENT = SQUARES ? SURGERY_SQUARES_RESIDENT : SURGERY_RESIDENT;
constexpr uint32_t ALL = ~0u, INFINITE = 0x7F800000u;

struct Job {
    const uint8_t* values[MOST_PARENTS];
    const float* scales[MOST_PARENTS];
    float weights[MOST_PARENTS];
    int32_t kinds[MOST_PARENTS];
    void* out;
    float* out_scales;
    double* sums;
    int64_t rows, cols;
    int32_t count, down, across;     // parents; blocks
    int32_t step_down, step_across;  // from one block of a thread block to its next
    int32_t slots;
    bool ue8m0, aligned;
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

// Bytes of a warp's slot: a block's runs of JOINT parents, and their scales.
template <int INPUT, int JOINT>
constexpr int SLOT = JOINT * RUNS * SIZE_OF<INPUT> * WARP * 16 + (INPUT == BF16 || INPUT == F32 ? 0 : 16);

// What is fetched next: parents from this one on.
struct Ahead {
    Spot spot;
    int32_t parent;
};

template <int KIND, int JOINT, bool ALIGNED>
__device__ __forceinline__ void fetch_parents(const Job& job, const Ahead& ahead, uint8_t* slot, uint8_t* scales) {
    const int64_t row = (int64_t)ahead.spot.down * BLOCK + threadIdx.x / WARP * WARP_ROWS;
    const int64_t col = (int64_t)ahead.spot.across * BLOCK, pitch = job.cols * SIZE_OF<KIND>;
    const int rows = (int)min(job.rows - row, (int64_t)BLOCK), cols = (int)min(job.cols - col, (int64_t)BLOCK);
#pragma unroll
    for (int j = 0; j < JOINT; ++j) {
        const uint8_t* from = job.values[ahead.parent + j] + row * pitch + col * SIZE_OF<KIND>;
        uint4* into = (uint4*)slot + j * RUNS * SIZE_OF<KIND> * WARP;
        if (ALIGNED || job.aligned) fetch_runs<KIND, RUNS>(into, from, pitch, STRIDE, rows, cols);
        else gather_runs<KIND, RUNS>(into, from, pitch, STRIDE, rows, cols);
    }
    if (KIND == FP8_BLOCK && threadIdx.x % WARP == 0) {
        const int64_t block = ahead.spot.block(job);
#pragma unroll
        for (int j = 0; j < JOINT; ++j)
            copy4((uint32_t)__cvta_generic_to_shared(scales + 4 * j), job.scales[ahead.parent + j] + block);
    }
}

// Always ends a group of copies, so that those to come can be counted.
template <int INPUT, int JOINT>
__device__ __forceinline__ void fetch(const Job& job, Ahead& ahead, uint8_t* slot) {
    if (ahead.spot.down < job.down) {
        uint8_t* scales = slot + JOINT * RUNS * SIZE_OF<INPUT> * WARP * 16;
        const int32_t kind = INPUT >= 0 ? INPUT : job.kinds[ahead.parent];
        if (kind == FP8_BLOCK) fetch_parents<FP8_BLOCK, JOINT, (INPUT >= 0)>(job, ahead, slot, scales);
        else if (kind == BF16) fetch_parents<BF16, JOINT, (INPUT >= 0)>(job, ahead, slot, scales);
        else fetch_parents<F32, JOINT, (INPUT >= 0)>(job, ahead, slot, scales);
        ahead.parent += JOINT;
        if (JOINT > 1 || ahead.parent == job.count) ahead.parent = 0, ahead.spot.step(job);
    }
    end_copies();
}

// Values 4g .. 4g + 3 of a chunk.
template <int KIND>
__device__ __forceinline__ void values(const uint4& chunk, int g, float* to) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    if (KIND == FP8_BLOCK) {
        unpack4(words[g], to);
    } else if (KIND == BF16) {
        const uint32_t a = words[2 * g % 4], b = words[(2 * g + 1) % 4];
        to[0] = float_of(a << 16), to[1] = float_of(a & 0xFFFF0000u);
        to[2] = float_of(b << 16), to[3] = float_of(b & 0xFFFF0000u);
    } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) to[k] = float_of(words[k]);
    }
}

// 16 values to where they lie, aligned to 16 bytes.
template <int KIND>
__device__ __forceinline__ void store_whole(void* into, int64_t at, const float* from) {
    if constexpr (KIND == FP8_BLOCK) {
        __stcs((uint4*)((uint8_t*)into + at), make_uint4(pack4(from), pack4(from + 4), pack4(from + 8), pack4(from + 12)));
    } else {
#pragma unroll
        for (int i = 0; i < RUN; i += RUN_OF<KIND>) store_run<KIND>(into, at + i, 0, true, from + i);
    }
}

// The first `count` of them, anywhere.
template <int KIND>
__device__ __forceinline__ void store_some(void* into, int64_t at, int count, const float* from) {
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
        if (i >= count) continue;
        if (KIND == FP8_BLOCK) ((uint8_t*)into)[at + i] = float_to_e4m3(from[i]);
        if (KIND == BF16) ((uint16_t*)into)[at + i] = float_to_bf16(from[i]);
        if (KIND == F32) ((float*)into)[at + i] = from[i];
    }
}

// What a thread keeps of a block. The first parent is kept where the others do not come together with it.
template <bool SQUARES, int JOINT>
struct Tile {
    static constexpr int KEPT = SQUARES && JOINT == 1 ? RUNS * RUN : 1;
    float total[RUNS * RUN];
    float base[KEPT];
    double square[JOINT][LANES];
};

// Its magnitude at least, in double precision. Conversions are few a cycle; moving the fields and a product are not.
__device__ __forceinline__ double widen(int k, float value) {
#ifndef SURGERY_WIDEN
#define SURGERY_WIDEN 0
#endif
    if (k % 4 >= SURGERY_WIDEN) return value;
    const uint32_t magnitude = bits_of(value) & 0x7FFFFFFFu;
    return __hiloint2double((int)(magnitude >> 3), (int)(magnitude << 29)) * 0x1p896;
}

// Run `r` of JOINT parents.
template <int KIND, bool SQUARES, int JOINT>
__device__ __forceinline__ void add_run(Tile<SQUARES, JOINT>& tile, int r, const uint8_t* slot, const float* scale,
                                        const float* weight, bool first) {
    constexpr int SIZE = SIZE_OF<KIND>, VALUES = RUN / SIZE;
    const int lane = threadIdx.x % WARP, row = lane / ROW_LANES, q = lane % ROW_LANES;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
        uint4 chunk[JOINT];
#pragma unroll
        for (int j = 0; j < JOINT; ++j) 
            chunk[j] = ((const uint4*)slot)[(j * RUNS + r) * SIZE * WARP + chunk_place<SIZE>(row, q, i)];
#pragma unroll
        for (int g = 0; g < VALUES / 4; ++g) {
            float kept[4];
#pragma unroll
            for (int j = 0; j < JOINT; ++j) {
                float value[4];
                values<KIND>(chunk[j], g, value);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int at = r * RUN + i * VALUES + 4 * g + k;
                    const float v = KIND == FP8_BLOCK ? __fmul_rn(value[k], scale[j]) : value[k];
                    if (SQUARES) {
                        float& base = JOINT > 1 ? kept[k] : tile.base[at % Tile<SQUARES, JOINT>::KEPT];
                        const bool is_base = JOINT > 1 ? j == 0 : first;
                        if (is_base) base = v;
                        const double gap = widen(k, is_base ? v : __fsub_rn(base, v));
                        tile.square[j][k % LANES] = __fma_rn(gap, gap, tile.square[j][k % LANES]);
                    }
                    const float term = __fmul_rn(v, weight[j]);
                    const float sum = JOINT > 1 && j == 0 ? term : __fadd_rn(tile.total[at], term);
                    tile.total[at] = SQUARES && JOINT == 1 && weight[j] == 0.0f ? tile.total[at] : sum;
                }
            }
        }
    }
}

template <int KIND, bool SQUARES, int JOINT>
__device__ __forceinline__ void add_parents(Tile<SQUARES, JOINT>& tile, const uint8_t* slot, const uint8_t* scales,
                                            const float* weight, bool first) {
    float scale[JOINT];
#pragma unroll
    for (int j = 0; j < JOINT; ++j) scale[j] = KIND == FP8_BLOCK ? ((const float*)scales)[j] : 1.0f;
#pragma unroll
    for (int r = 0; r < RUNS; ++r) add_run<KIND>(tile, r, slot, scale, weight, first);
}

// The largest magnitude of a warp, as bits: they order as magnitudes do. Infinity counts, NaN does not.
__device__ __forceinline__ uint32_t largest(const float* values) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < RUNS * RUN; ++i) most = fmaxf(most, fabsf(values[i]));
    return __reduce_max_sync(ALL, bits_of(most));
}

__device__ __forceinline__ uint32_t largest_finite(const float* values) {
    int32_t most = 0;
#pragma unroll
    for (int i = 0; i < RUNS * RUN; ++i) most = max(most, finite_magnitude(values[i]));
    return __reduce_max_sync(ALL, (uint32_t)most);
}

// Values to quotients, and their scale.
__device__ __forceinline__ float divide(float* values, float amax, bool ue8m0) {
    const float scale = block_scale(amax, ue8m0);
    // Both sides times the same power of two, exact where the quotient is not far below code 1.
    const float factor = scale < 0x1p-60f ? 0x1p100f : scale > 0x1p60f ? 0x1p-64f : 1.0f;
    if (factor != 1.0f) {
#pragma unroll
        for (int i = 0; i < RUNS * RUN; ++i) values[i] = __fmul_rn(values[i], factor);
    }
    const Reciprocal reciprocal(__fmul_rn(scale, factor));
#pragma unroll
    for (int i = 0; i < RUNS * RUN; ++i) values[i] = reciprocal.times(values[i]);
    return scale;
}

// A warp's sums of squares, each in its lane 0.
template <int JOINT>
__device__ __forceinline__ void add_lanes(double (*square)[LANES], double (*into)[WARPS]) {
#pragma unroll
    for (int j = 0; j < JOINT; ++j) {
        double sum = square[j][0] + square[j][1];
#pragma unroll
        for (int lane = WARP / 2; lane; lane /= 2) sum += __shfl_xor_sync(ALL, sum, lane);
        if (threadIdx.x % WARP == 0) into[j][threadIdx.x / WARP] = sum;
    }
}

// INPUT: the kind of every parent, all of them aligned, or -1 where that is not so. JOINT: 2 where there are two, taken together, else 1.
// SQUARES: with sums; where parents come one by one, the first is kept for them.
template <int INPUT, int OUTPUT, bool SQUARES, int JOINT>
__global__ void __launch_bounds__(THREADS, RESIDENT<SQUARES>)
    combine_kernel(const __grid_constant__ Job job) {
    extern __shared__ uint4 space[];
    // Two of each by turns: one barrier per block keeps the next block's writes from this one's reads.
    __shared__ uint32_t found[2][WARPS], again[WARPS];
    __shared__ double added[2][SQUARES ? MOST_PARENTS : 1][WARPS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    uint8_t* const ring = (uint8_t*)space + warp * (job.slots * SLOT<INPUT, JOINT>);
    Spot spot(job);
    Ahead ahead{spot, 0};
#pragma unroll 1
    for (int s = 0; s < job.slots; ++s) fetch<INPUT, JOINT>(job, ahead, ring + s * SLOT<INPUT, JOINT>);
    int slot = 0, turn = 0;
#pragma unroll 1
    for (; spot.down < job.down; spot.step(job), turn ^= 1) {
        Tile<SQUARES, JOINT> tile;
        // -0 + x is x for every x, zeros and their signs included.
#pragma unroll
        for (int i = 0; i < RUNS * RUN; ++i) tile.total[i] = -0.0f;
        const int32_t count = JOINT > 1 ? JOINT : job.count;
#pragma unroll 1
        for (int32_t p = 0; p < count; p += JOINT) {
#pragma unroll
            for (int j = 0; j < JOINT; ++j) tile.square[j][0] = tile.square[j][1] = 0.0;
            float weight[JOINT];
#pragma unroll
            for (int j = 0; j < JOINT; ++j) weight[j] = job.weights[p + j];
            const int32_t kind = INPUT >= 0 ? INPUT : job.kinds[p];
            uint8_t* here = ring + slot * SLOT<INPUT, JOINT>;
            const uint8_t* scales = here + JOINT * RUNS * SIZE_OF<INPUT> * WARP * 16;
            await_copies(job.slots - 1);
            __syncwarp();
            if (kind == FP8_BLOCK) add_parents<FP8_BLOCK>(tile, here, scales, weight, p == 0);
            else if (kind == BF16) add_parents<BF16>(tile, here, scales, weight, p == 0);
            else add_parents<F32>(tile, here, scales, weight, p == 0);
            __syncwarp();
            fetch<INPUT, JOINT>(job, ahead, here);
            slot = slot + 1 == job.slots ? 0 : slot + 1;
            if (SQUARES) add_lanes<JOINT>(tile.square, added[turn] + (SQUARES ? p : 0));
        }
        if (OUTPUT == FP8_BLOCK) {
            const uint32_t most = largest(tile.total);
            if (lane == 0) found[turn][warp] = most;
        }
        if (OUTPUT == FP8_BLOCK || SQUARES) __syncthreads();
        const int64_t block = spot.block(job);
        if (SQUARES) {
            for (int32_t p = warp; p < job.count; p += WARPS) {
                double sum = added[turn][SQUARES ? p : 0][lane % WARPS];
#pragma unroll
                for (int step = WARPS / 2; step; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
                if (lane == 0) job.sums[block * job.count + p] = sum;
            }
            if (!job.out) continue;
        }
        if (OUTPUT == FP8_BLOCK) {
            uint32_t most = __reduce_max_sync(ALL, found[turn][lane % WARPS]);
            if (most >= INFINITE) {
                most = largest_finite(tile.total);
                if (lane == 0) again[warp] = most;
                __syncthreads();
                most = __reduce_max_sync(ALL, again[lane % WARPS]);
            }
            const float scale = divide(tile.total, float_of(most), job.ue8m0);
            if (threadIdx.x == 0) job.out_scales[block] = scale;
        }
        const int64_t row = (int64_t)spot.down * BLOCK + threadIdx.x / ROW_LANES;
        const int64_t col = (int64_t)spot.across * BLOCK + threadIdx.x % ROW_LANES * RUN;
#pragma unroll
        for (int r = 0; r < RUNS; ++r) {
            const int64_t at = (row + r * STRIDE) * job.cols + col;
            if (row + r * STRIDE >= job.rows || col >= job.cols) continue;
            if (INPUT >= 0 || job.aligned) store_whole<OUTPUT>(job.out, at, tile.total + r * RUN);
            else store_some<OUTPUT>(job.out, at, (int)min(job.cols - col, (int64_t)RUN), tile.total + r * RUN);
        }
    }
}

template <int INPUT, int OUTPUT, bool SQUARES, int JOINT>
cudaError_t launch(Job job, cudaStream_t stream) {
    const auto kernel = combine_kernel<INPUT, OUTPUT, SQUARES, JOINT>;
    constexpr int ONE = WARPS * SLOT<INPUT, JOINT>;
    int device = 0, processors = 0, most_shared = 0, resident = 0;
    cudaFuncAttributes own;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&own, kernel);
    if (status != cudaSuccess) return status;
    most_shared = (most_shared - 1024 * (RESIDENT<SQUARES> - 1)) / RESIDENT<SQUARES> - (int)own.sharedSizeBytes;
    job.slots = std::max(1, std::min(MOST_SLOTS, most_shared / ONE));
    const int shared = job.slots * ONE;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status == cudaSuccess)
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, THREADS, shared);
    if (status != cudaSuccess) return status;
    const int64_t blocks = (int64_t)job.down * job.across, most = (int64_t)processors * std::max(resident, 1);
#ifdef SURGERY_DIRECT
    const int32_t grid = (int32_t)blocks;
    job.slots = 1;
#else
    const int32_t grid = (int32_t)(blocks < most ? blocks : most);
#endif
    job.step_down = grid / job.across;
    job.step_across = grid % job.across;
    kernel<<<(unsigned)grid, THREADS, shared, stream>>>(job);
    return cudaGetLastError();
}

template <int INPUT, int OUTPUT, int JOINT>
cudaError_t choose_squares(const Job& job, cudaStream_t stream) {
    return job.sums ? launch<INPUT, OUTPUT, true, JOINT>(job, stream) : launch<INPUT, OUTPUT, false, JOINT>(job, stream);
}

template <int OUTPUT>
cudaError_t choose(const Job& job, cudaStream_t stream) {
    int32_t kind = job.kinds[0];
    bool together = job.count == 2;
    for (int32_t i = 0; i < job.count; ++i) {
        if (job.kinds[i] != kind || !job.aligned) kind = -1;
        together = together && job.weights[i] != 0.0f;
    }
    if (kind == FP8_BLOCK)
        return together ? choose_squares<FP8_BLOCK, OUTPUT, 2>(job, stream) : choose_squares<FP8_BLOCK, OUTPUT, 1>(job, stream);
    if (kind == BF16)
        return together ? choose_squares<BF16, OUTPUT, 2>(job, stream) : choose_squares<BF16, OUTPUT, 1>(job, stream);
    if (kind == F32) return choose_squares<F32, OUTPUT, 1>(job, stream);
    return choose_squares<-1, OUTPUT, 1>(job, stream);
}

bool even(const void* pointer) { return ((uintptr_t)pointer & 15) == 0; }

}  // namespace

extern "C" int32_t surgery_cuda_combine(const Combine* work, cudaStream_t stream) {
    const int64_t across = (work->cols + BLOCK - 1) / BLOCK, down = (work->rows + BLOCK - 1) / BLOCK;
    if (down > 0x3FFFFFFF || across > 0x3FFFFFFF || work->count > MOST_PARENTS) return cudaErrorInvalidConfiguration;
    Job job = {};
    job.out = work->out;
    job.out_scales = work->out_scales;
    job.sums = work->sums;
    job.rows = work->rows;
    job.cols = work->cols;
    job.down = (int32_t)down;
    job.across = (int32_t)across;
    job.ue8m0 = work->ue8m0;
    job.aligned = work->cols % RUN == 0 && even(work->out);
    // A parent of weight 0 takes part in the sums of squares alone.
    for (int32_t i = 0; i < work->count; ++i) {
        if (!work->sums && work->weights[i] == 0.0f) continue;
        job.values[job.count] = (const uint8_t*)work->parents[i];
        job.scales[job.count] = work->scales[i];
        job.weights[job.count] = work->weights[i];
        job.kinds[job.count++] = work->kinds[i];
        job.aligned = job.aligned && even(work->parents[i]);
    }
    if (work->out_kind == FP8_BLOCK) return choose<FP8_BLOCK>(job, stream);
    if (work->out_kind == BF16) return choose<BF16>(job, stream);
    return choose<F32>(job, stream);
}
