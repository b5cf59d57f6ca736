// Parents as a kernel is given them, and neighbours of one, of a kind known to the compiler or not.
#pragma once
#include "../cpu/blocks.h"
#include "raw.cuh"
#include "store.cuh"

namespace surgery {

constexpr int MOST_PARENTS = 16, ANY = -1;

struct Parents {
    const void* values[MOST_PARENTS];
    const float* scales[MOST_PARENTS];
    float weights[MOST_PARENTS];
    int32_t kinds[MOST_PARENTS];
};

// `aligned`: whether runs of `run` neighbours lie on 16 bytes, or on as many as they take.
inline Parents parents_of(const Combine& job, int run, bool* aligned) {
    Parents parents = {};
    *aligned = job.cols % run == 0 && even(job.out);
    for (int32_t i = 0; i < job.count; ++i) {
        parents.values[i] = job.parents[i];
        parents.scales[i] = job.scales[i];
        parents.weights[i] = job.weights[i];
        parents.kinds[i] = job.kinds[i];
        *aligned = *aligned && even(job.parents[i]);
    }
    return parents;
}

// The base and parent i alone, without weights.
inline Parents pair_of(const Parents& all, int32_t i) {
    Parents pair = {};
    for (int32_t p = 0; p < 2; ++p) {
        pair.values[p] = all.values[p * i];
        pair.scales[p] = all.scales[p * i];
        pair.kinds[p] = all.kinds[p * i];
    }
    return pair;
}

// The kind of every parent, or ANY where they differ.
inline int32_t kind_of(const Combine& job) {
    for (int32_t i = 1; i < job.count; ++i)
        if (job.kinds[i] != job.kinds[0]) return ANY;
    return job.kinds[0];
}

template <int KIND, int COUNT>
struct Held {
    static constexpr int WORDS = KIND == ANY ? COUNT : Raw<KIND == ANY ? F32 : KIND, COUNT>::WORDS;
    uint32_t words[WORDS];

    // Of parent p in a block; 1 where its kind has none.
    __device__ __forceinline__ static float scale(const Parents& parents, int p, int64_t block) {
        const int kind = KIND == ANY ? parents.kinds[p] : KIND;
        return kind == FP8_BLOCK ? parents.scales[p][block] : 1.0f;
    }

    __device__ __forceinline__ void load(const Parents& parents, int p, int64_t at, int64_t count, bool aligned,
                                         bool again = false) {
        const int kind = KIND == ANY ? parents.kinds[p] : KIND;
        if (kind == FP8_BLOCK) take<FP8_BLOCK>(parents.values[p], at, count, aligned, again);
        if (kind == BF16) take<BF16>(parents.values[p], at, count, aligned, again);
        if (kind == F32) take<F32>(parents.values[p], at, count, aligned, again);
    }

    __device__ __forceinline__ void values(const Parents& parents, int p, float scale, float* to) const {
        const int kind = KIND == ANY ? parents.kinds[p] : KIND;
        if (kind == FP8_BLOCK) {
            give<FP8_BLOCK>(to);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) to[i] = __fmul_rn(to[i], scale);
        }
        if (kind == BF16) give<BF16>(to);
        if (kind == F32) give<F32>(to);
    }

private:
    template <int OWN>
    __device__ __forceinline__ void take(const void* from, int64_t at, int64_t count, bool aligned, bool again) {
        Raw<OWN, COUNT> raw;
        raw.load(from, at, count, aligned, again);
#pragma unroll
        for (int i = 0; i < raw.WORDS; ++i) words[i % WORDS] = raw.words[i];
    }

    template <int OWN>
    __device__ __forceinline__ void give(float* to) const {
        Raw<OWN, COUNT> raw;
#pragma unroll
        for (int i = 0; i < raw.WORDS; ++i) raw.words[i] = words[i % WORDS];
        raw.values(to);
    }
};

}  // namespace surgery
