// See ../core/packed.h. Built with -ffp-contract=off.
#include "../core/packed.h"

#include "blocks.h"
#include "convert.h"

using namespace surgery;

namespace {

constexpr int RUN = 512;  // codes in hand, a multiple of 8

// Eight codes of `BITS` lie at the bottom of `lanes`: one a byte, by three steps that double the gaps.
template <int BITS>
inline uint64_t spread(uint64_t lanes) {
    constexpr uint64_t ONE = 1, FOUR = (ONE << 4 * BITS) - 1, TWO = (ONE << 2 * BITS) - 1, SINGLE = (ONE << BITS) - 1;
    if (BITS == 8) return lanes;
    lanes = (lanes & FOUR) | (lanes & FOUR << 4 * BITS) << (32 - 4 * BITS);
    lanes = (lanes & TWO * 0x100000001ull) | (lanes & (TWO << 2 * BITS) * 0x100000001ull) << (16 - 2 * BITS);
    return (lanes & SINGLE * 0x1000100010001ull) | (lanes & (SINGLE << BITS) * 0x1000100010001ull) << (8 - BITS);
}

// `count` codes from a stream of which `bytes` are left.
template <int BITS>
void unpack(const uint8_t* stream, int64_t bytes, int count, uint8_t* __restrict codes) {
    int i = 0;
    for (; i < count && i / 8 * BITS + 8 <= bytes; i += 8) {
        uint64_t lanes;
        memcpy(&lanes, stream + i / 8 * BITS, 8);
        lanes = spread<BITS>(lanes);
        memcpy(codes + i, &lanes, 8);
    }
    for (; i < count; i += 8) {
        uint64_t lanes = 0;
        const int64_t at = i / 8 * BITS, left = bytes - at;
        memcpy(&lanes, stream + at, left < BITS ? left : BITS);
        lanes = spread<BITS>(lanes);
        memcpy(codes + i, &lanes, 8);
    }
}

template <int BITS>
void stream_rows(const Stream& job, int64_t first, int64_t last) {
    uint8_t codes[RUN];
    for (int64_t row = first; row < last; ++row) {
        const uint8_t* from = (const uint8_t*)(job.words + row * job.row_words);
        const int64_t bytes = job.row_words * 4;
        for (int64_t start = 0; start < job.cols; start += RUN) {
            const int64_t end = start + RUN < job.cols ? start + RUN : job.cols;
            const int64_t skipped = start / 8 * BITS;
            unpack<BITS>(from + skipped, bytes - skipped, (int)(end - start), codes);
            for (int64_t c = start; c < end;) {
                const int64_t group = c / job.width, stop = (group + 1) * job.width < end ? (group + 1) * job.width : end;
                const float scale = job.scales[row * job.groups + group];
                const int32_t zero = job.zeros ? job.zeros[row * job.groups + group] : job.zero;
                const uint8_t* code = codes + (c - start);
                convert(job.out, job.kind, row * job.cols + c, (int)(stop - c),
                        [=](int i) { return on_grid(code[i], zero, scale); });
                c = stop;
            }
        }
    }
}

void stream(const Stream* job, int64_t first, int64_t last) {
    switch (job->bits) {
        case 2: return stream_rows<2>(*job, first, last);
        case 3: return stream_rows<3>(*job, first, last);
        case 4: return stream_rows<4>(*job, first, last);
        case 5: return stream_rows<5>(*job, first, last);
        case 6: return stream_rows<6>(*job, first, last);
        case 7: return stream_rows<7>(*job, first, last);
        default: return stream_rows<8>(*job, first, last);
    }
}

// Blocks first .. last of the scales; an even number of codes each.
void nibbles(const Nibbles* job, int64_t first, int64_t last) {
    struct Pair {
        float one, two;
    } pairs[256];
    for (int byte = 0; byte < 256; ++byte) {
        const float high = job->levels[byte >> 4], low = job->levels[byte & 15];
        pairs[byte] = job->high_first ? Pair{high, low} : Pair{low, high};
    }
    alignas(64) float values[RUN + 1];
    const int64_t end = last * job->block < job->count ? last * job->block : job->count;
    for (int64_t at = first * job->block; at < end;) {
        const int64_t block = at / job->block, stop = (block + 1) * job->block < end ? (block + 1) * job->block : end;
        const int count = (int)(stop - at < RUN ? stop - at : RUN);
        const uint8_t* bytes = job->bytes + at / 2;
        for (int i = 0; i < (count + 1) / 2; ++i) memcpy(values + 2 * i, &pairs[bytes[i]], 8);
        const float scale = job->scales[block];
        const float* from = values;
        convert(job->out, job->kind, at, count, [=](int i) { return from[i] * scale; });
        at += count;
    }
}

}  // namespace

extern "C" {
extern const PackedLoops SURGERY_PACKED = {stream, nibbles, SURGERY_AWQ};
}
