// See ../core/encode.h. Built with -ffp-contract=off.
#include "../core/encode.h"

#include "blocks.h"

using namespace surgery;

namespace {

constexpr int RUN = 512;  // codes in hand, a multiple of 8

inline float value_of(float stored) { return stored; }
inline float value_of(uint16_t stored) { return bf16_to_float(stored); }

template <typename T>
GridOf grid_over(const ToStream& job, const T* __restrict from) {
    int32_t low = 0, high = 0;
    for (int64_t i = 0; i < job.width; ++i) {
        const int32_t key = ordered(bits_of(value_of(from[i])));
        low = key < low ? key : low;
        high = key > high ? key : high;
    }
    const bool broken = high > 0x7F800000 || low < -1 - 0x7F800000;
    const float least = float_of(broken ? 0x7FC00000u : (uint32_t)ordered((uint32_t)low));
    const float most = float_of(broken ? 0x7FC00000u : (uint32_t)high);
    return span_grid(least, most, job.top, job.symmetric, job.scale_kind);
}

template <typename T>
void codes_of(const T* __restrict from, int count, float scale, float low, float high, uint8_t* __restrict to) {
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) to[i] = grid_code(grid_offset(value_of(from[i]) / scale, low, high), low);
}

// Eight codes, one a byte, to the bottom of `lanes`: three steps that halve the number of gaps.
template <int BITS>
inline uint64_t squeeze(uint64_t lanes) {
    constexpr uint64_t ONE = 1, FOUR = (ONE << 4 * BITS) - 1, TWO = (ONE << 2 * BITS) - 1, SINGLE = (ONE << BITS) - 1;
    lanes = (lanes & SINGLE * 0x1000100010001ull) | (lanes >> (8 - BITS) & (SINGLE << BITS) * 0x1000100010001ull);
    lanes = (lanes & TWO * 0x100000001ull) | (lanes >> (16 - 2 * BITS) & (TWO << 2 * BITS) * 0x100000001ull);
    return (lanes & FOUR) | (lanes >> (32 - 4 * BITS) & FOUR << 4 * BITS);
}

// Codes, zeros up to a multiple of 8 after them, to a stream of which `bytes` are left.
template <int BITS>
void pack(const uint8_t* codes, int count, uint8_t* stream, int64_t bytes) {
    if (BITS == 8) {
        memcpy(stream, codes, (size_t)count);
        return;
    }
    uint64_t lanes[RUN / 8];
    const int eights = (count + 7) / 8;
    memcpy(lanes, codes, (size_t)eights * 8);
    for (int i = 0; i < eights; ++i) lanes[i] = squeeze<BITS == 8 ? 4 : BITS>(lanes[i]);
    for (int i = 0; i < eights; ++i) {
        const int64_t left = bytes - i * BITS;
        if (left >= 8) memcpy(stream + i * BITS, &lanes[i], 8);  // what it writes too much is written again
        else memcpy(stream + i * BITS, &lanes[i], left < BITS ? left : BITS);
    }
}

template <int BITS, typename T>
void stream_rows(const ToStream& job, int64_t first, int64_t last) {
    alignas(64) uint8_t codes[RUN];
    for (int64_t row = first; row < last; ++row) {
        const T* from = (const T*)job.values + row * job.cols;
        float* scales = job.scales + row * job.groups;
        uint8_t *zeros = job.zeros + row * job.groups, *stream = job.stream + row * job.row_bytes;
        for (int64_t g = 0; g < job.groups; ++g) {
            const GridOf grid = grid_over(job, from + g * job.width);
            scales[g] = grid.scale;
            zeros[g] = (uint8_t)grid.zero;
        }
        for (int64_t start = 0; start < job.cols; start += RUN) {
            const int64_t end = start + RUN < job.cols ? start + RUN : job.cols;
            for (int64_t c = start; c < end;) {
                const int64_t group = c / job.width, stop = (group + 1) * job.width < end ? (group + 1) * job.width : end;
                const float low = -(float)zeros[group], high = (float)(job.top - zeros[group]);
                codes_of(from + c, (int)(stop - c), scales[group], low, high, codes + (c - start));
                c = stop;
            }
            for (int64_t c = end; c % 8; ++c) codes[c - start] = 0;
            pack<BITS>(codes, (int)(end - start), stream + start / 8 * BITS, job.row_bytes - start / 8 * BITS);
        }
        const int64_t done = BITS == 8 ? job.cols : (job.cols + 7) / 8 * BITS;
        if (done < job.row_bytes) memset(stream + done, 0, (size_t)(job.row_bytes - done));
    }
}

template <typename T>
void choose(const ToStream& job, int64_t first, int64_t last) {
    switch (job.bits) {
        case 2: return stream_rows<2, T>(job, first, last);
        case 3: return stream_rows<3, T>(job, first, last);
        case 4: return stream_rows<4, T>(job, first, last);
        case 5: return stream_rows<5, T>(job, first, last);
        case 6: return stream_rows<6, T>(job, first, last);
        case 7: return stream_rows<7, T>(job, first, last);
        default: return stream_rows<8, T>(job, first, last);
    }
}

void to_stream(const ToStream* job, int64_t first, int64_t last) {
    if (job->kind == BF16) choose<uint16_t>(*job, first, last);
    else choose<float>(*job, first, last);
}

template <bool DIVIDED, typename T>
void nearest(const T* __restrict from, int count, float by, const float* borders, uint8_t* __restrict to) {
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) {
        const float value = value_of(from[i]);
        to[i] = (uint8_t)borders_below(DIVIDED ? value / by : value * by, borders);
    }
}

template <typename T>
void nibble_block(const ToNibbles& job, int64_t block, const float* borders) {
    alignas(64) uint8_t codes[RUN];
    const int64_t begin = block * job.block, left = job.count - begin;
    const bool whole = left >= job.block;
    const int64_t length = whole ? job.block : left;
    const T* __restrict from = (const T*)job.values + begin;
    int32_t magnitude = 0;
    for (int64_t i = 0; i < length; ++i) {
        const int32_t here = (int32_t)(bits_of(value_of(from[i])) & 0x7FFFFFFFu);
        magnitude = here > magnitude ? here : magnitude;
    }
    const float absmax = float_of((uint32_t)magnitude);
    job.absmax[block] = whole ? absmax : raised(absmax);
    for (int64_t start = 0; start < length; start += RUN) {
        const int count = (int)(length - start < RUN ? length - start : RUN);
        if (whole) nearest<false>(from + start, count, 1.0f / raised(absmax), borders, codes);
        else nearest<true>(from + start, count, raised(absmax), borders, codes);
        if (count % 2) codes[count] = (uint8_t)borders_below(0.0f, borders);
        uint8_t* __restrict to = job.bytes + (begin + start) / 2;
#pragma GCC ivdep
        for (int i = 0; i < (count + 1) / 2; ++i) to[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
    }
}

// Blocks first .. last of an even number of values each.
void to_nibbles(const ToNibbles* job, int64_t first, int64_t last) {
    float borders[15];
    memcpy(borders, job->borders, sizeof borders);
    for (int64_t block = first; block < last; ++block) {
        if (job->kind == BF16) nibble_block<uint16_t>(*job, block, borders);
        else nibble_block<float>(*job, block, borders);
    }
}

}  // namespace

extern "C" {
extern const EncodeLoops SURGERY_ENCODE = {to_stream, to_nibbles};
}
