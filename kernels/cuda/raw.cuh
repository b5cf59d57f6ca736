// Neighbours of a row as they are stored, in registers: loads of several are under way before the first is used.
#pragma once
#include "e4m3.cuh"

namespace surgery {

template <int KIND, int COUNT>
struct Raw {
    static constexpr int WIDTH = KIND == FP8_BLOCK ? 1 : KIND == BF16 ? 2 : 4, WORDS = COUNT * WIDTH / 4;
    uint32_t words[WORDS];

    // `aligned`: to as many bytes as COUNT take, 16 at most. Of fewer, the first `count` lie there, and zeros follow.
    // `again`: they will be read once more, and should stay in the caches.
    __device__ __forceinline__ void load(const void* from, int64_t at, int64_t count, bool aligned, bool again = false) {
        const uint8_t* place = (const uint8_t*)from + at * WIDTH;
        const bool whole = aligned && count >= COUNT;
        if (whole && WORDS >= 4) {
#pragma unroll
            for (int i = 0; i < WORDS / 4; ++i) {
                const uint4 four = again ? __ldg((const uint4*)place + i) : __ldcs((const uint4*)place + i);
                words[4 * i] = four.x, words[(4 * i + 1) % WORDS] = four.y;
                words[(4 * i + 2) % WORDS] = four.z, words[(4 * i + 3) % WORDS] = four.w;
            }
            return;
        }
        if (whole && WORDS == 2) {
            const uint2 two = again ? __ldg((const uint2*)place) : __ldcs((const uint2*)place);
            words[0] = two.x, words[1 % WORDS] = two.y;
            return;
        }
        if (whole && WORDS == 1) {
            words[0] = again ? __ldg((const uint32_t*)place) : __ldcs((const uint32_t*)place);
            return;
        }
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = 0;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (i >= count) continue;
            if (KIND == FP8_BLOCK) words[i / 4 % WORDS] |= (uint32_t)((const uint8_t*)from)[at + i] << 8 * (i % 4);
            if (KIND == BF16) words[i / 2 % WORDS] |= (uint32_t)((const uint16_t*)from)[at + i] << 16 * (i % 2);
            if (KIND == F32) words[i % WORDS] = ((const uint32_t*)from)[at + i];
        }
    }

    // Values 4g .. 4g + 3, without a block's scale.
    __device__ __forceinline__ void four(int g, float* to) const {
        if (KIND == FP8_BLOCK) {
            unpack4(words[g % WORDS], to);
        } else if (KIND == BF16) {
            const uint32_t a = words[2 * g % WORDS], b = words[(2 * g + 1) % WORDS];
            to[0] = float_of(a << 16), to[1] = float_of(a & 0xFFFF0000u);
            to[2] = float_of(b << 16), to[3] = float_of(b & 0xFFFF0000u);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) to[i] = float_of(words[(4 * g + i) % WORDS]);
        }
    }

    __device__ __forceinline__ void values(float* to) const {
#pragma unroll
        for (int g = 0; g < COUNT / 4; ++g) four(g, to + 4 * g);
    }
};

}  // namespace surgery
