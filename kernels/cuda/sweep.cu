// The column sweep of ../core/sweep.h on CUDA; the C interface of kernels/cpu/entry.cpp, with a stream.
//
// Eight lanes own a row, four rows share a warp, and the factor's block lies in shared memory:
//
//     lane l of a row: columns 32 s + 4 l .. + 3 of each of the four slots s, in registers
//
// For each column all lanes round their own one (the owner's counts, and costs no more than waiting for it), the
// owner's error goes round by one shuffle, and each lane makes up for it in its own columns. The chain of one column
// (quotient, rounding, quotient, shuffle, product, difference) bounds the time of a matrix of a few thousand rows, so
// quotients are taken by reciprocals that are known beforehand. Built with -fmad=false.
#include <cuda_runtime.h>

#include "../core/sweep.h"

using namespace surgery;

namespace {

constexpr int THREADS = 256, LANES = 8, SLOTS = 4, QUAD = 4, SLOT = LANES * QUAD;
constexpr int ROWS = THREADS / LANES;
constexpr int SHARED = MOST_COLS * MOST_COLS * (int)sizeof(float);
constexpr unsigned ALL = ~0u;

// What n:m asks for: nothing, a choice within a lane's own four columns, or among columns of several lanes.
enum Pattern { NONE = 0, FOUR = 1, ANY = 2 };

// Correctly rounded, NaN for what `quotient` leaves to the division proper.
__device__ __forceinline__ float reciprocal(float divisor) {
    const bool usual = divisor >= 0x1p-40f && divisor <= 0x1p40f;
    return usual ? __frcp_rn(divisor) : float_of(0x7FC00000u);
}

// From a correctly rounded reciprocal one correction gives the IEEE quotient (Markstein) where nothing under- or
// overflows: the corrected value is within 2^-46 of the quotient before it is rounded, and all pairs of mantissas
// whose quotient is as close to a boundary of rounding were tried.
__device__ __forceinline__ float corrected(float value, float divisor, float inverse) {
    const float found = __fmul_rn(value, inverse);
    return __fmaf_rn(__fmaf_rn(-found, divisor, value), inverse, found);
}

// value / divisor to the last bit. Tiny results are left to the division, +0 apart.
__device__ __forceinline__ float quotient(float value, float divisor, float inverse) {
    const float found = corrected(value, divisor, inverse);
    const bool usual = fabsf(found) >= 0x1p-60f || (bits_of(value) | bits_of(found)) == 0;
    return usual ? found : __fdiv_rn(value, divisor);
}

// A quotient of which only its rounding to a whole number counts: tiny ones need not be exact.
__device__ __forceinline__ float coarse_quotient(float value, float divisor, float inverse) {
    const float found = corrected(value, divisor, inverse);
    return found == found ? found : __fdiv_rn(value, divisor);
}

__device__ __forceinline__ float clamped_offset(float quotient, float low, float high) {
#if __CUDA_ARCH__ >= 800
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(quotient) : "f"(low));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(quotient) : "f"(high));
    return __fadd_rn(__fadd_rn(quotient, 12582912.0f), -12582912.0f);
#else
    return grid_offset(quotient, low, high);
#endif
}

template <typename T>
struct Four {
    T at[QUAD];
};

// `whole`: four elements lie there, aligned; else the first `count` do, and `rest` stands for the others.
__device__ __forceinline__ Four<float> load4(const float* from, int count, bool whole, float rest) {
    Four<float> to;
    if (whole) {
        const float4 four = *(const float4*)from;
        to.at[0] = four.x, to.at[1] = four.y, to.at[2] = four.z, to.at[3] = four.w;
    } else {
#pragma unroll
        for (int k = 0; k < QUAD; ++k) to.at[k] = k < count ? from[k] : rest;
    }
    return to;
}

__device__ __forceinline__ void store4(float* into, int count, bool whole, const Four<float>& from) {
    if (whole) {
        *(float4*)into = make_float4(from.at[0], from.at[1], from.at[2], from.at[3]);
        return;
    }
#pragma unroll
    for (int k = 0; k < QUAD; ++k)
        if (k < count) into[k] = from.at[k];
}

// Rows c of the factor, zero below the diagonal's four columns and past the last: columns that are done stay as
// they are and are never read again.
__device__ __forceinline__ void load_factor(const Sweep& job, bool aligned, float* shared) {
    const float* factor = job.factor + blockIdx.y * job.factor_batch;
    const int height = (job.cols + QUAD - 1) / QUAD * QUAD;
#pragma unroll 4
    for (int i = threadIdx.x; i < height * (MOST_COLS / QUAD); i += THREADS) {
        const int row = i / (MOST_COLS / QUAD), col = i % (MOST_COLS / QUAD) * QUAD;
        const int count = row < job.cols && col + QUAD > row ? min(job.cols - col, QUAD) : 0;
        const Four<float> four = load4(factor + row * job.factor_row + col, count, aligned && count == QUAD, 0.0f);
        store4(shared + row * MOST_COLS + col, QUAD, true, four);
    }
}

// What a lane knows of its columns beside their values. Bit 4 s + k of `gone`: column k of slot s is pruned.
struct Lane {
    float value[SLOTS][QUAD];
    float scale[SLOTS][QUAD];
    uint32_t zero[SLOTS];
    uint32_t gone;
};

template <bool GRID>
__device__ __forceinline__ void load_lane(const Sweep& job, int64_t row, int lane, bool aligned, Lane& mine) {
    const float* weights = job.weights + blockIdx.y * job.weight_batch + row * job.weight_row;
    const uint8_t* mask = job.mask + blockIdx.y * job.mask_batch + row * job.mask_row;
    const int64_t at = (blockIdx.y * job.rows + row) * job.groups;
    const int32_t* group = job.group + blockIdx.y * job.group_batch;
    mine.gone = 0;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
        const int col = s * SLOT + lane * QUAD;
        const int count = row < job.rows ? min(job.cols - col, QUAD) : 0;
        const Four<float> four = load4(weights + col, count, aligned && count == QUAD, 0.0f);
        mine.zero[s] = 0;
#pragma unroll
        for (int k = 0; k < QUAD; ++k) {
            mine.value[s][k] = four.at[k];
            mine.scale[s][k] = 1.0f;
            if (GRID && k < count) {
                const int64_t place = at + group[col + k];
                mine.scale[s][k] = job.scales[place];
                mine.zero[s] |= (uint32_t)job.zeros[place] << 8 * k;
            }
            if (job.mask && k < count && mask[col + k]) mine.gone |= 1u << (s * QUAD + k);
        }
    }
}

__device__ __forceinline__ float diagonal(const float* shared, int col) { return shared[col * (MOST_COLS + 1)]; }

// n of a lane's own m = 2 or 4 neighbours from column k on.
__device__ __forceinline__ uint32_t choose_four(const Sweep& job, const float* value, const float* across,
                                                const float* inverse, int k0) {
    uint32_t key[QUAD];
    int before[QUAD] = {};
#pragma unroll
    for (int k = 0; k < QUAD; ++k) key[k] = saliency_key(quotient(value[k], across[k], inverse[k]));
#pragma unroll
    for (int i = 1; i < QUAD; ++i)
#pragma unroll
        for (int j = 0; j < i; ++j) {
            const bool together = job.of == QUAD || i / 2 == j / 2;
            const bool later = key[i] < key[j];
            before[j] += together && later;
            before[i] += together && !later;
        }
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < QUAD; ++k)
        if (k >= k0 && k < k0 + job.of && before[k] < job.prune) bits |= 1u << k;
    return bits;
}

// The pruned columns among m from column `first` of slot `s` on, which reach into the next slot at most.
template <int s>
__device__ __forceinline__ uint32_t choose_any(const Sweep& job, const Lane& mine, const float* shared, int lane,
                                               int first) {
    constexpr int TWO = s + 1 < SLOTS ? 2 : 1;
    uint32_t key[TWO][QUAD];
    int before[TWO][QUAD] = {};
#pragma unroll
    for (int t = 0; t < TWO; ++t)
#pragma unroll
        for (int k = 0; k < QUAD; ++k) {
            const int col = (s + t) * SLOT + lane * QUAD + k;
            const float across = col < job.cols ? diagonal(shared, col) : 1.0f;
            key[t][k] = saliency_key(__fdiv_rn(mine.value[s + t][k], across));
        }
    for (int other = first / QUAD; other * QUAD < first + job.of; ++other) {
#pragma unroll
        for (int k = 0; k < QUAD; ++k) {
            const int col = other * QUAD + k;
            const uint32_t low = __shfl_sync(ALL, key[0][k], other, LANES);
            const uint32_t high = TWO == 2 ? __shfl_sync(ALL, key[TWO - 1][k], other, LANES) : low;
            const uint32_t theirs = other < (s + 1) * LANES ? low : high;
            const bool counts = col >= first && col < first + job.of;
#pragma unroll
            for (int t = 0; t < TWO; ++t)
#pragma unroll
                for (int i = 0; i < QUAD; ++i) {
                    const bool sooner = col < (s + t) * SLOT + lane * QUAD + i;
                    before[t][i] += counts && (theirs < key[t][i] || (theirs == key[t][i] && sooner));
                }
        }
    }
    uint32_t bits = 0;
#pragma unroll
    for (int t = 0; t < TWO; ++t)
#pragma unroll
        for (int k = 0; k < QUAD; ++k) {
            const int col = (s + t) * SLOT + lane * QUAD + k;
            if (col >= first && col < first + job.of && before[t][k] < job.prune) bits |= 1u << ((s + t) * QUAD + k);
        }
    return bits;
}

// The 32 columns of one slot, whole quads at a time; columns past the last are zeros and change nothing.
template <int s, bool GRID, int PATTERN>
__device__ __forceinline__ void sweep_slot(const Sweep& job, const float* shared, int64_t row, int lane, bool aligned,
                                           Lane& mine, int& next) {
    const int mine_first = s * SLOT + lane * QUAD;
    float across[QUAD], inverse[QUAD], unit[QUAD], low[QUAD], high[QUAD];
    Four<float> kept = {}, error = {};
    uint32_t code = 0;
#pragma unroll
    for (int k = 0; k < QUAD; ++k) {
        across[k] = mine_first + k < job.cols ? diagonal(shared, mine_first + k) : 1.0f;
        inverse[k] = reciprocal(across[k]);
        if (GRID) {
            const int zero = mine.zero[s] >> 8 * k & 255;
            unit[k] = reciprocal(mine.scale[s][k]);
            low[k] = (float)(0 - zero);
            high[k] = (float)(job.top - zero);
        }
    }
    const int quads = min((job.cols - s * SLOT + QUAD - 1) / QUAD, LANES);
#pragma unroll 1
    for (int owner = 0; owner < quads; ++owner) {
#pragma unroll
        for (int k = 0; k < QUAD; ++k) {
            const int col = s * SLOT + owner * QUAD + k;
            if (PATTERN == FOUR && k % 2 == 0 && col % job.of == 0) {
                const uint32_t bits = choose_four(job, mine.value[s], across, inverse, k);
                if (lane == owner) mine.gone |= bits << (s * QUAD);
            }
            if (PATTERN == ANY && col == next && col < job.cols) {
                mine.gone |= choose_any<s>(job, mine, shared, lane, col);
                next += job.of;
            }
            const float w = mine.value[s][k];
            const bool gone = mine.gone >> (s * QUAD + k) & 1;
            float q = w, offset = 0.0f;
            if (GRID) {
                offset = clamped_offset(coarse_quotient(w, mine.scale[s][k], unit[k]), low[k], high[k]);
                q = __fmul_rn(offset, mine.scale[s][k]);
            }
            q = gone ? 0.0f : q;
            const float e = quotient(__fsub_rn(w, q), across[k], inverse[k]);
            const float shared_error = __shfl_sync(ALL, e, owner, LANES);
            if (lane == owner) {
                kept.at[k] = q;
                error.at[k] = e;
                if (GRID) code |= (uint32_t)grid_code(gone ? 0.0f : offset, low[k]) << 8 * k;
            }
            const float4* behind = (const float4*)(shared + col * MOST_COLS) + lane;
#pragma unroll
            for (int t = s; t < SLOTS; ++t) {
                const float4 u = behind[t * LANES];
                mine.value[t][0] = __fsub_rn(mine.value[t][0], __fmul_rn(shared_error, u.x));
                mine.value[t][1] = __fsub_rn(mine.value[t][1], __fmul_rn(shared_error, u.y));
                mine.value[t][2] = __fsub_rn(mine.value[t][2], __fmul_rn(shared_error, u.z));
                mine.value[t][3] = __fsub_rn(mine.value[t][3], __fmul_rn(shared_error, u.w));
            }
        }
    }
    const int count = row < job.rows ? min(job.cols - mine_first, QUAD) : 0;
    if (count <= 0) return;
    const bool whole = aligned && count == QUAD;
    float* values = job.values + blockIdx.y * job.value_batch + row * job.value_row + mine_first;
    store4(values, count, whole, kept);
    float* errors = job.errors + blockIdx.y * job.error_batch + row * job.error_row + mine_first;
    store4(errors, count, whole, error);
    if (!GRID) return;
    uint8_t* codes = job.codes + blockIdx.y * job.code_batch + row * job.code_row + mine_first;
    if (whole) {
        *(uint32_t*)codes = code;
        return;
    }
#pragma unroll
    for (int k = 0; k < QUAD; ++k)
        if (k < count) codes[k] = (uint8_t)(code >> 8 * k);
}

// `aligned`: four columns of any operand lie at a multiple of their size.
template <bool GRID, int PATTERN>
__global__ void __launch_bounds__(THREADS, 2) sweep_kernel(const __grid_constant__ Sweep job, bool aligned) {
    extern __shared__ float4 space[];
    float* shared = (float*)space;
    const int lane = threadIdx.x % LANES;
    const int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x / LANES;
    Lane mine;
    load_lane<GRID>(job, row, lane, aligned, mine);
    load_factor(job, aligned, shared);
    __syncthreads();
    int next = 0;
    sweep_slot<0, GRID, PATTERN>(job, shared, row, lane, aligned, mine, next);
    if (job.cols > SLOT) sweep_slot<1, GRID, PATTERN>(job, shared, row, lane, aligned, mine, next);
    if (job.cols > 2 * SLOT) sweep_slot<2, GRID, PATTERN>(job, shared, row, lane, aligned, mine, next);
    if (job.cols > 3 * SLOT) sweep_slot<3, GRID, PATTERN>(job, shared, row, lane, aligned, mine, next);
}

template <bool GRID, int PATTERN>
cudaError_t launch(const Sweep& job, bool aligned, cudaStream_t stream) {
    const int64_t tiles = (job.rows + ROWS - 1) / ROWS;
    if (tiles > 0x7FFFFFFF || job.batch > 65535) return cudaErrorInvalidConfiguration;
    const cudaError_t status = cudaFuncSetAttribute(sweep_kernel<GRID, PATTERN>,
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
    if (status != cudaSuccess) return status;
    sweep_kernel<GRID, PATTERN><<<dim3((unsigned)tiles, (unsigned)job.batch), THREADS, SHARED, stream>>>(job, aligned);
    return cudaGetLastError();
}

template <bool GRID>
cudaError_t choose(const Sweep& job, bool aligned, cudaStream_t stream) {
    if (!job.of) return launch<GRID, NONE>(job, aligned, stream);
    if (job.of == 2 || job.of == 4) return launch<GRID, FOUR>(job, aligned, stream);
    return launch<GRID, ANY>(job, aligned, stream);
}

bool even(const void* pointer, int64_t size, int64_t batch, int64_t row) {
    return (uintptr_t)pointer % (QUAD * size) == 0 && batch % QUAD == 0 && row % QUAD == 0;
}

}  // namespace

extern "C" int32_t surgery_cuda_sweep(const Sweep* job, cudaStream_t stream) {
    const bool aligned = even(job->weights, 4, job->weight_batch, job->weight_row) &&
                         even(job->factor, 4, job->factor_batch, job->factor_row) &&
                         even(job->values, 4, job->value_batch, job->value_row) &&
                         even(job->errors, 4, job->error_batch, job->error_row) &&
                         (!job->codes || even(job->codes, 1, job->code_batch, job->code_row));
    return job->scales ? choose<true>(*job, aligned, stream) : choose<false>(*job, aligned, stream);
}
