// Divergences of rows on CUDA; see divergence of the CPU, whose order of sums this is.
//
// A thread block has a row, a thread its columns c, c + 128, .... The row is read three times, from the caches after the
// first, for its largest numbers, the sums of powers and the divergence: powers are cheaper to make twice than to keep.
#include "../core/merge.h"
#include "../cpu/merge.h"
#include "eight.cuh"
#include "parents.cuh"

namespace surgery {

namespace {

constexpr int THREADS = BLOCK, WARPS = THREADS / 32, TOGETHER = 4;

struct Rows {
    Parents parents;
    float* out;
    int64_t cols, across;
};

// Whether the row has this one of the thread's columns.
__device__ __forceinline__ bool there(const Rows& job, int64_t group) { return group * BLOCK + threadIdx.x < job.cols; }

// TOGETHER columns of one parent, 128 apart; those that are not there are 0.
template <int KIND>
__device__ __forceinline__ void load_columns(const Rows& job, int p, int64_t group, float* to) {
    const int kind = KIND == ANY ? job.parents.kinds[p] : KIND;
    const int64_t row = blockIdx.x;
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k) {
        const int64_t col = (group + k) * BLOCK + threadIdx.x, at = row * job.cols + col;
        to[k] = 0.0f;
        if (!there(job, group + k)) continue;
        if (kind == FP8_BLOCK) {
            const float scale = job.parents.scales[p][row / BLOCK * job.across + group + k];
            to[k] = __fmul_rn(e4m3_to_float(__ldg((const uint8_t*)job.parents.values[p] + at)), scale);
        } else if (kind == BF16) {
            to[k] = bf16_to_float(__ldg((const uint16_t*)job.parents.values[p] + at));
        } else {
            to[k] = __ldg((const float*)job.parents.values[p] + at);
        }
    }
}

// The sum of 128 lanes, halves onto halves, for every thread.
__device__ __forceinline__ double folded(double own, double* lanes) {
    lanes[threadIdx.x] = own;
    __syncthreads();
    double sum = 0.0;
    if (threadIdx.x < 32) {
        sum = (lanes[threadIdx.x] + lanes[threadIdx.x + 64]) + (lanes[threadIdx.x + 32] + lanes[threadIdx.x + 96]);
#pragma unroll
        for (int half = 16; half; half /= 2) sum += __shfl_xor_sync(~0u, sum, half);
    }
    __syncthreads();
    if (threadIdx.x == 0) lanes[0] = sum;
    __syncthreads();
    sum = lanes[0];
    __syncthreads();
    return sum;
}

// SMALL: exp_series will do for the whole rows of both parents.
template <bool SMALL>
__device__ __forceinline__ double power(float value, double largest) {
    const double x = (double)value - largest;
    return SMALL ? exp_series(x) : exp_of_negative(x);
}

template <int KIND, bool SMALL>
__device__ __forceinline__ double sum_of_powers(const Rows& job, int p, double largest) {
    double sum = 0.0;
    for (int64_t group = 0; group < job.across; group += TOGETHER) {
        float v[TOGETHER];
        load_columns<KIND>(job, p, group, v);
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k)
            if (there(job, group + k)) sum += power<SMALL>(v[k], largest);
    }
    return sum;
}

template <int KIND, bool SMALL>
__device__ __forceinline__ double divergence_of(const Rows& job, const double* largest, double by_base, double by_model) {
    double total = 0.0;
    for (int64_t group = 0; group < job.across; group += TOGETHER) {
        float base[TOGETHER], model[TOGETHER];
        load_columns<KIND>(job, 0, group, base);
        load_columns<KIND>(job, 1, group, model);
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k) {
            if (!there(job, group + k)) continue;
            const double p = power<SMALL>(model[k], largest[1]) * by_model + 1e-8;
            const double q = power<SMALL>(base[k], largest[0]) * by_base + 1e-8;
            const double gap = p - q, both = p + q;
            if (near_one(gap, both)) total += p * log_series(gap / both);
            else total += p * log_of_positive(p / q);
        }
    }
    return total;
}

template <int KIND>
__global__ void __launch_bounds__(THREADS) divergence_kernel(const __grid_constant__ Rows job) {
    __shared__ double lanes[THREADS];
    __shared__ float found[4][WARPS];
    // The largest numbers of both, and the largest of their negatives; NaN where there is one.
    float most[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    for (int64_t group = 0; group < job.across; group += TOGETHER) {
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            float v[TOGETHER];
            load_columns<KIND>(job, p, group, v);
#pragma unroll
            for (int k = 0; k < TOGETHER; ++k) {
                if (!there(job, group + k)) continue;
                most[p] = larger(most[p], v[k]);
                most[2 + p] = larger(most[2 + p], -v[k]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int half = 16; half; half /= 2) most[m] = larger(most[m], __shfl_xor_sync(~0u, most[m], half));
        if (threadIdx.x % 32 == 0) found[m][threadIdx.x / 32] = most[m];
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int w = 0; w < WARPS; ++w) most[m] = larger(most[m], found[m][w]);
    }
    const double largest[2] = {most[0], most[1]};
    const bool small = -(double)most[2] - largest[0] >= SMALL && -(double)most[3] - largest[1] >= SMALL;
    double sum[2];
#pragma unroll
    for (int p = 0; p < 2; ++p)
        sum[p] = small ? sum_of_powers<KIND, true>(job, p, largest[p]) : sum_of_powers<KIND, false>(job, p, largest[p]);
    const double by_base = 1.0 / folded(sum[0], lanes), by_model = 1.0 / folded(sum[1], lanes);
    const double own = small ? divergence_of<KIND, true>(job, largest, by_base, by_model)
                             : divergence_of<KIND, false>(job, largest, by_base, by_model);
    const double total = folded(own, lanes);
    if (threadIdx.x == 0) job.out[blockIdx.x] = (float)(total > 0.0 ? total : 0.0);
}

}  // namespace

}  // namespace surgery

using namespace surgery;

extern "C" int32_t surgery_cuda_divergence(const Divergence* job, cudaStream_t stream) {
    if (job->at.rows > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
    bool aligned;
    const Rows rows = {parents_of(job->at, 1, &aligned), job->out, job->at.cols, (job->at.cols + BLOCK - 1) / BLOCK};
    const unsigned grid = (unsigned)job->at.rows;
    const int32_t kind = kind_of(job->at);
    if (kind == FP8_BLOCK) divergence_kernel<FP8_BLOCK><<<grid, THREADS, 0, stream>>>(rows);
    else if (kind == BF16) divergence_kernel<BF16><<<grid, THREADS, 0, stream>>>(rows);
    else divergence_kernel<ANY><<<grid, THREADS, 0, stream>>>(rows);
    return cudaGetLastError();
}
