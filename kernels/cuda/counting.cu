// Counts of differences by their bits on CUDA, for the selection of a k-th magnitude; see counting of the CPU.
//
// The upper 16 bits are counted in shared memory where numbers lie between 2^-87 and 2^41, which is 16384 counters, and
// zeros in registers; all others in global memory, those of a warp that fall together at once. The lower 16 bits of the
// numbers that share a wanted digit are often few different ones: 4096 of them have a counter in shared memory, those
// that came first. Thread blocks take 128 x 128 blocks in turn, fewer than 2^32 numbers each.
#include "parents.cuh"
#include "../cpu/merge.h"
#include "tile.cuh"

namespace surgery {

namespace {

constexpr int COUNT = 8, FIRST_BIN = 40 * 128, BINS = 128 * 128, MOST_DIGITS = 8;
using Runs = Place<COUNT>;
constexpr uint32_t NONE = ~0u;
using Counts = unsigned long long;

struct Counter {
    Parents parents;  // the base and one model
    const float* row_weights;
    Counts* counts;
    int64_t rows, cols, across, blocks;
    int32_t digits[MOST_DIGITS];
    int32_t digit_count;
    bool aligned;
};

// Adds 1 for every lane that calls it; those of one address together.
__device__ __forceinline__ void add_together(Counts* place) {
    const unsigned peers = __match_any_sync(__activemask(), (Counts)place);
    if (threadIdx.x % 32 == __ffs(peers) - 1) atomicAdd(place, (Counts)__popc(peers));
}

// Calls visit(bits) for each run of the thread's; what is no number of the matrix has the bits NONE.
template <int KIND, typename Visit>
__device__ __forceinline__ void for_runs(const Counter& job, Visit visit) {
    using Values = Held<KIND, COUNT>;
    for (int64_t block = blockIdx.x; block < job.blocks; block += gridDim.x) {
        const Runs place(block, job.rows, job.cols, job.across, job.aligned);
        const float scale[2] = {Values::scale(job.parents, 0, block), Values::scale(job.parents, 1, block)};
        Values raw[Runs::RUNS][2];
#pragma unroll
        for (int r = 0; r < Runs::RUNS; ++r) {
#pragma unroll
            for (int p = 0; p < 2; ++p) raw[r][p].load(job.parents, p, place.run(r), place.values(r), job.aligned);
        }
#pragma unroll
        for (int r = 0; r < Runs::RUNS; ++r) {
            const int count = place.values(r);
            if (!count) continue;
            const float weight = job.row_weights ? job.row_weights[place.row + r * Runs::STRIDE] : 1.0f;
            float base[COUNT], model[COUNT];
            raw[r][0].values(job.parents, 0, scale[0], base);
            raw[r][1].values(job.parents, 1, scale[1], model);
            uint32_t bits[COUNT];
#pragma unroll
            for (int c = 0; c < COUNT; ++c) {
                bits[c] = bits_of(__fmul_rn(__fsub_rn(model[c], base[c]), weight)) & 0x7FFFFFFFu;
                if (c >= count) bits[c] = NONE;
            }
            visit(bits);
        }
    }
}

template <int KIND>
__global__ void __launch_bounds__(TILE_THREADS) upper_kernel(const __grid_constant__ Counter job) {
    extern __shared__ uint32_t bins[];
    for (int b = threadIdx.x; b < BINS; b += TILE_THREADS) bins[b] = 0;
    __syncthreads();
    uint32_t zeros = 0;
    for_runs<KIND>(job, [&](const uint32_t* bits) {
#pragma unroll
        for (int c = 0; c < COUNT; ++c) {
            const uint32_t bin = (bits[c] >> 16) - FIRST_BIN;
            if (!bits[c]) ++zeros;
            else if (bin < BINS) atomicAdd(bins + bin, 1u);
            else if (bits[c] != NONE) add_together(job.counts + (bits[c] >> 16));
        }
    });
    zeros = __reduce_add_sync(~0u, zeros);
    if (zeros && threadIdx.x % 32 == 0) atomicAdd(job.counts, (Counts)zeros);
    __syncthreads();
    for (int b = threadIdx.x; b < BINS; b += TILE_THREADS)
        if (bins[b]) atomicAdd(job.counts + FIRST_BIN + b, (Counts)bins[b]);
}

// Counters of a thread block for some of the numbers, by digit and lower bits.
struct Cache {
    static constexpr int SLOTS = 4096;
    static constexpr uint32_t FREE = ~0u;
    uint32_t owners[SLOTS], counts[SLOTS];

    __device__ __forceinline__ void add(uint32_t number, Counts* elsewhere) {
        const uint32_t slot = number * 2654435761u >> 20;
        uint32_t owner = *(volatile uint32_t*)(owners + slot);
        if (owner == FREE) {
            owner = atomicCAS(owners + slot, FREE, number);
            if (owner == FREE) owner = number;
        }
        if (owner == number) atomicAdd(counts + slot, 1u);
        else atomicAdd(elsewhere + number, (Counts)1);
    }
};

template <int KIND>
__global__ void __launch_bounds__(TILE_THREADS, KIND == ANY ? 1 : 2) lower_kernel(const __grid_constant__ Counter job) {
    __shared__ Cache cache;
    for (int s = threadIdx.x; s < Cache::SLOTS; s += TILE_THREADS) cache.owners[s] = Cache::FREE, cache.counts[s] = 0;
    __syncthreads();
    uint32_t zeros = 0;
    for_runs<KIND>(job, [&](const uint32_t* bits) {
        uint32_t wanted = 0;
#pragma unroll
        for (int c = 0; c < COUNT; ++c) zeros += !bits[c];
        for (int d = 0; d < job.digit_count; ++d) {
#pragma unroll
            for (int c = 0; c < COUNT; ++c) wanted |= (uint32_t)(bits[c] >> 16 == job.digits[d]) << c;
        }
        // Few are: lanes take theirs together, one a turn, wherever they stand in their runs.
        for (; wanted; wanted &= wanted - 1) {
            const int first = __ffs(wanted) - 1;
            uint32_t number = bits[0];
#pragma unroll
            for (int c = 1; c < COUNT; ++c) number = first == c ? bits[c] : number;
            for (int d = 0; number && d < job.digit_count; ++d)
                if (number >> 16 == job.digits[d]) cache.add((uint32_t)d << 16 | (number & 0xFFFF), job.counts);
        }
    });
    zeros = __reduce_add_sync(~0u, zeros);
    if (zeros && threadIdx.x % 32 == 0) {
        for (int d = 0; d < job.digit_count; ++d)
            if (job.digits[d] == 0) atomicAdd(job.counts + d * (int64_t)65536, (Counts)zeros);
    }
    __syncthreads();
    for (int s = threadIdx.x; s < Cache::SLOTS; s += TILE_THREADS)
        if (cache.counts[s]) atomicAdd(job.counts + cache.owners[s], (Counts)cache.counts[s]);
}

// As many thread blocks as run at once.
template <typename Kernel>
cudaError_t launch(Kernel kernel, const Counter& job, int shared, cudaStream_t stream) {
    int device = 0, processors = 0, resident = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess && shared)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (status == cudaSuccess)
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, TILE_THREADS, shared);
    if (status != cudaSuccess) return status;
    const int64_t most = (int64_t)processors * max(resident, 1);
    kernel<<<(unsigned)min(job.blocks, most), TILE_THREADS, shared, stream>>>(job);
    return cudaGetLastError();
}

template <int KIND>
cudaError_t count(const Counter& job, cudaStream_t stream) {
    if (job.digit_count) return launch(lower_kernel<KIND>, job, 0, stream);
    return launch(upper_kernel<KIND>, job, BINS * (int)sizeof(uint32_t), stream);
}

}  // namespace

}  // namespace surgery

using namespace surgery;

// `digits` lie in the host's memory, `counts` and `row_weights` on the device.
extern "C" int32_t surgery_cuda_counting(const Counting* job, cudaStream_t stream) {
    const Combine& at = job->at;
    if (at.count > MOST_PARENTS) return cudaErrorInvalidConfiguration;
    bool aligned;
    const Parents all = parents_of(at, COUNT, &aligned);
    for (int32_t i = 1; i < at.count; ++i) {
        Counter one = {};
        one.parents = pair_of(all, i);
        one.row_weights = job->row_weights;
        one.rows = at.rows;
        one.cols = at.cols;
        one.across = (at.cols + BLOCK - 1) / BLOCK;
        one.blocks = (at.rows + BLOCK - 1) / BLOCK * one.across;
        one.aligned = aligned;
        int32_t first = 0;
        do {
            const int64_t row = job->digit_count ? ((int64_t)(i - 1) * job->digit_count + first) * 65536 : (i - 1) * 32768;
            one.counts = (Counts*)job->counts + row;
            one.digit_count = min(job->digit_count - first, MOST_DIGITS);
            for (int32_t d = 0; d < one.digit_count; ++d)
                one.digits[d] = job->digits[(i - 1) * job->digit_count + first + d];
            const bool same = at.kinds[0] == at.kinds[i];
            const cudaError_t status = same && at.kinds[i] == BF16        ? count<BF16>(one, stream)
                                       : same && at.kinds[i] == FP8_BLOCK ? count<FP8_BLOCK>(one, stream)
                                                                          : count<ANY>(one, stream);
            if (status != cudaSuccess) return status;
            first += MOST_DIGITS;
        } while (first < job->digit_count);
    }
    return cudaSuccess;
}
