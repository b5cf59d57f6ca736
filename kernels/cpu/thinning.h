// One run of task vectors: what stays of each, and what they come to together.
#pragma once
#include "../core/merge.h"
#include "merge.h"
#include "tiles.h"

namespace surgery {
namespace {

// Whether entries of a strip of 128 rows stay, drawn in the order of the rows.
void draw(const uint64_t* state, float density, int64_t numel, uint8_t* stays) {
    Sfc64 source = {state[0], state[1], state[2], state[3]};
    alignas(64) uint32_t drawn[256];
    for (int64_t begin = 0; begin < numel; begin += 256) {
        for (int k = 0; k < 256; k += 2) {
            const uint64_t next = source.next();
            drawn[k] = (uint32_t)next;
            drawn[k + 1] = (uint32_t)(next >> 32);
        }
        const int n = (int)(numel - begin < 256 ? numel - begin : 256);
        uint8_t* __restrict to = stays + begin;
#pragma GCC ivdep
        for (int k = 0; k < n; ++k) to[k] = uniform_of(drawn[k]) < density;
    }
}

template <int WIDTH>
inline __attribute__((always_inline)) void thin_run(const Thin& thin, const uint8_t* stays, int width,
                                                    float* __restrict delta) {
    const int n = WIDTH ? WIDTH : width;
    const float low = thin.low, high = thin.high, density = thin.density, factor = thin.factor;
    if (thin.kind == NOTHING) {
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) delta[c] *= 0.0f;
    } else if (thin.kind == BETWEEN) {
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) {
            const float size = __builtin_fabsf(delta[c]);
            delta[c] *= (size >= low ? 1.0f : 0.0f) * (size <= high ? 1.0f : 0.0f);
        }
    } else if (thin.kind == DRAWN) {
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) delta[c] *= (float)stays[c];
        if (thin.divide)
#pragma GCC ivdep
            for (int c = 0; c < n; ++c) delta[c] /= density;
    }
    if (factor != 1.0f)
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) delta[c] *= factor;
}

// The run's sum over models of weight * difference (terms, a row of 128 each), with or without an election.
template <int WIDTH>
inline __attribute__((always_inline)) void bring_together(const Tasks& job, const float* terms, int width,
                                                          float* __restrict total) {
    const int n = WIDTH ? WIDTH : width;
    const int32_t models = job.at.count - 1;
    memcpy(total, terms, sizeof(float) * n);
    for (int32_t i = 1; i < models; ++i)
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) total[c] += terms[i * BLOCK + c];
    if (!job.elect) {
        const float share = job.share;
        if (share != 1.0f)
#pragma GCC ivdep
            for (int c = 0; c < n; ++c) total[c] /= share;
        return;
    }
    alignas(64) float sign[BLOCK], divisor[BLOCK];
#pragma GCC ivdep
    for (int c = 0; c < n; ++c) {
        sign[c] = total[c] >= 0.0f ? 1.0f : -1.0f;
        total[c] = 0.0f;
        divisor[c] = 0.0f;
    }
    for (int32_t i = 0; i < models; ++i) {
        const float weight = job.at.weights[i + 1];
        const float* term = terms + i * BLOCK;
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) {
            const float agrees = term[c] * sign[c] > 0.0f ? 1.0f : 0.0f;
            total[c] += term[c] * agrees;
            divisor[c] += weight * agrees;
        }
    }
    if (job.divide)
#pragma GCC ivdep
        for (int c = 0; c < n; ++c) {
            const float by = __builtin_fabsf(divisor[c]) < 1e-8f ? 1.0f : divisor[c];
            total[c] /= by;
        }
}

}  // namespace
}  // namespace surgery
