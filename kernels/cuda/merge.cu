// Merge methods on CUDA, from stored parents to a stored result in one pass; see merge.cpp of the CPU.
//
// 512 threads have a 128 x 128 block, in runs of 8 neighbours. To FP8 the block stays in registers between its amax and
// its codes. One or two models are held together; of more, each is read again, from the caches, where signs are elected.
// Built with -fmad=false: products and sums are rounded one by one, as on the CPU.
#include "statistics.h"
#include "thinning.cuh"
#include "tile.cuh"

namespace surgery {

namespace {

constexpr int COUNT = 8, FEW = 2;
constexpr int MANY = 0, FUSION = -1;  // in place of a number of models
using Runs = Place<COUNT>;

struct Merge {
    Parents parents;
    Kept kept[MOST_PARENTS];
    const float* row_weights;  // FUSION
    float threshold;
    int32_t count, elect, divide;
    float share, scale;
    void* out;
    float* out_scales;
    int32_t out_kind;
    int64_t rows, cols, across;
    bool ue8m0, aligned;
};

// weight * thinned difference of one model.
template <int KIND>
__device__ __forceinline__ void term_of(const Merge& job, int p, const Held<KIND, COUNT>& raw, float scale, uint32_t bits,
                                        const float* base, float* term) {
    const float weight = job.parents.weights[p];
    raw.values(job.parents, p, scale, term);
#pragma unroll
    for (int c = 0; c < COUNT; ++c) term[c] = __fsub_rn(term[c], base[c]);
    job.kept[p].thin<COUNT>(term, bits);
#pragma unroll
    for (int c = 0; c < COUNT; ++c) term[c] = __fmul_rn(term[c], weight);
}

// An election: what agrees with the sign of the sum of all, and the weights that took part.
struct Ballot {
    uint32_t positive;  // a bit for each
    float total[COUNT], divisor[COUNT];

    __device__ __forceinline__ explicit Ballot(const float* sums) : positive(0) {
#pragma unroll
        for (int c = 0; c < COUNT; ++c) positive |= (uint32_t)(sums[c] >= 0.0f) << c, total[c] = divisor[c] = 0.0f;
    }

    __device__ __forceinline__ void add(const float* term, float weight) {
#pragma unroll
        for (int c = 0; c < COUNT; ++c) {
            const float agrees = (positive >> c & 1 ? term[c] : -term[c]) > 0.0f ? 1.0f : 0.0f;
            total[c] = __fadd_rn(total[c], __fmul_rn(term[c], agrees));
            divisor[c] = __fadd_rn(divisor[c], __fmul_rn(weight, agrees));
        }
    }

    __device__ __forceinline__ void count(bool divide, float* to) const {
#pragma unroll
        for (int c = 0; c < COUNT; ++c) to[c] = total[c];
        if (!divide) return;
#pragma unroll
        for (int c = 0; c < COUNT; ++c) to[c] = divided(to[c], fabsf(divisor[c]) < 1e-8f ? 1.0f : divisor[c]);
    }
};

__device__ __forceinline__ void add_to(float* total, const float* term, bool first) {
#pragma unroll
    for (int c = 0; c < COUNT; ++c) total[c] = first ? term[c] : __fadd_rn(total[c], term[c]);
}

// A run's sum over its models, which `term(p, to)` gives in any order and as often as asked.
template <int MODELS, typename Term>
__device__ __forceinline__ void bring_together(const Merge& job, float* total, Term term) {
    constexpr int MOST = MODELS == MANY ? 1 : MODELS;
    float held[MOST][COUNT];
    if (MODELS == MANY) {
#pragma unroll 1
        for (int p = 1; p < job.count; ++p) {
            term(p, held[0]);
            add_to(total, held[0], p == 1);
        }
    } else {
#pragma unroll
        for (int p = 1; p <= MOST; ++p) {
            if (p >= job.count) continue;
            term(p, held[p - 1]);
            add_to(total, held[p - 1], p == 1);
        }
    }
    if (!job.elect) {
        if (job.share == 1.0f) return;
#pragma unroll
        for (int c = 0; c < COUNT; ++c) total[c] = divided(total[c], job.share);
        return;
    }
    Ballot ballot(total);
    if (MODELS == MANY) {
#pragma unroll 1
        for (int p = 1; p < job.count; ++p) {
            term(p, held[0]);
            ballot.add(held[0], job.parents.weights[p]);
        }
    } else {
#pragma unroll
        for (int p = 1; p <= MOST; ++p)
            if (p < job.count) ballot.add(held[p - 1], job.parents.weights[p]);
    }
    ballot.count(job.divide, total);
}

// MODELS: at most so many, MANY, or FUSION.
template <int MODELS, int KIND, bool CODES>
__global__ void __launch_bounds__(TILE_THREADS, CODES || (KIND == ANY && MODELS != FUSION) ? 1 : 2)
    merge_kernel(const __grid_constant__ Merge job) {
    using Values = Held<KIND, COUNT>;
    constexpr int MOST = MODELS == FUSION ? 1 : MODELS, KEPT = CODES ? Runs::RUNS * COUNT : COUNT;
    const int64_t block = blockIdx.x;
    const Runs place(block, job.rows, job.cols, job.across, job.aligned);
    float results[KEPT];
#pragma unroll(CODES || MODELS == FUSION ? Runs::RUNS : 1)
    for (int r = 0; r < Runs::RUNS; ++r) {
        float* total = results + (CODES ? r * COUNT : 0);
        const int64_t at = place.run(r);
        const int32_t count = place.values(r);
        Values raw[MOST + 1];
#pragma unroll
        for (int p = 0; p <= MOST; ++p)
            if (p < job.count) raw[p].load(job.parents, p, at, count, job.aligned);
        float base[COUNT];
        raw[0].values(job.parents, 0, Values::scale(job.parents, 0, block), base);
        if (MODELS == FUSION) {
            const float weight = count ? job.row_weights[place.row + r * Runs::STRIDE] : 0.0f;
            raw[MOST].values(job.parents, 1, Values::scale(job.parents, 1, block), total);
#pragma unroll
            for (int c = 0; c < COUNT; ++c) {
                const float delta = __fsub_rn(total[c], base[c]);
                const float kept = __fmul_rn(fabsf(delta), weight) >= job.threshold ? 1.0f : 0.0f;
                total[c] = __fadd_rn(__fmul_rn(delta, kept), base[c]);
            }
        } else {
            bring_together<MODELS == FUSION ? 1 : MODELS>(job, total, [&](int p, float* to) {
                const float scale = Values::scale(job.parents, p, block);
                const uint32_t bits = job.kept[p].bits(at, count);
                if (MODELS == MANY) raw[0].load(job.parents, p, at, count, job.aligned, job.elect);
                term_of(job, p, raw[MODELS == MANY ? 0 : p], scale, bits, base, to);
            });
#pragma unroll
            for (int c = 0; c < COUNT; ++c) total[c] = __fadd_rn(__fmul_rn(total[c], job.scale), base[c]);
        }
        if (!CODES) {
            if (job.out_kind == BF16) store<BF16, COUNT>(job.out, at, count, place.whole(r), total);
            else store<F32, COUNT>(job.out, at, count, place.whole(r), total);
        }
    }
    if (!CODES) return;
    const float scale = divide_block<KEPT>(results, job.ue8m0);
    if (threadIdx.x == 0) job.out_scales[block] = scale;
#pragma unroll
    for (int r = 0; r < Runs::RUNS; ++r)
        store<FP8_BLOCK, COUNT>(job.out, place.run(r), place.values(r), place.whole(r), results + r * COUNT % KEPT);
}

template <int MODELS, int KIND>
void launch(const Merge& job, int64_t blocks, cudaStream_t stream) {
    if (job.out_kind == FP8_BLOCK) merge_kernel<MODELS, KIND, true><<<(unsigned)blocks, TILE_THREADS, 0, stream>>>(job);
    else merge_kernel<MODELS, KIND, false><<<(unsigned)blocks, TILE_THREADS, 0, stream>>>(job);
}

template <int MODELS>
cudaError_t launch(Merge& job, const Combine& at, cudaStream_t stream) {
    const int64_t blocks = (at.rows + BLOCK - 1) / BLOCK * ((at.cols + BLOCK - 1) / BLOCK);
    if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
    job.parents = parents_of(at, COUNT, &job.aligned);
    job.count = at.count;
    job.out = at.out;
    job.out_scales = at.out_scales;
    job.out_kind = at.out_kind;
    job.rows = at.rows;
    job.cols = at.cols;
    job.across = (at.cols + BLOCK - 1) / BLOCK;
    job.ue8m0 = at.ue8m0;
    const int32_t kind = kind_of(at);
    if (kind == FP8_BLOCK) launch<MODELS, FP8_BLOCK>(job, blocks, stream);
    else if (kind == BF16) launch<MODELS, BF16>(job, blocks, stream);
    else launch<MODELS, ANY>(job, blocks, stream);
    return cudaGetLastError();
}

}  // namespace

}  // namespace surgery

using namespace surgery;

extern "C" {

// The sums are read for by themselves, so that they have the CPU's order.
int32_t surgery_cuda_tasks(const Tasks* job, cudaStream_t stream) {
    const Combine& at = job->at;
    if (at.count > MOST_PARENTS) return cudaErrorInvalidConfiguration;
    if (at.sums) {
        const cudaError_t status = add_task_sums(at, stream);
        if (status != cudaSuccess || !at.out) return status;
    }
    const cudaError_t status = draw_bits(*job, stream);
    if (status != cudaSuccess) return status;
    Merge merge = {};
    for (int32_t i = 1; i < at.count; ++i) merge.kept[i] = kept_of(*job, i);
    merge.elect = job->elect;
    merge.divide = job->divide;
    merge.share = job->share;
    merge.scale = job->scale;
    return at.count <= FEW + 1 ? launch<FEW>(merge, at, stream) : launch<MANY>(merge, at, stream);
}

int32_t surgery_cuda_fusion(const Fusion* job, cudaStream_t stream) {
    if (job->at.sums) {
        const cudaError_t status = add_task_sums(job->at, stream);
        if (status != cudaSuccess) return status;
    }
    Merge merge = {};
    merge.row_weights = job->row_weights;
    merge.threshold = job->threshold;
    return launch<FUSION>(merge, job->at, stream);
}

}
