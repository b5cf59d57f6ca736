// The largest magnitude among stored values, by their bits: NaN is larger than infinity, and infinity than the rest.
#include "blocks.h"

#include <string.h>

namespace {

template <typename Bits>
uint64_t largest_of(const Bits* __restrict from, Bits* __restrict to, Bits mask, int64_t count) {
    Bits largest = 0;
    if (to)
        for (int64_t i = 0; i < count; ++i) {
            const Bits bits = from[i];
            to[i] = bits;
            largest = (Bits)(bits & mask) > largest ? (Bits)(bits & mask) : largest;
        }
    else
        for (int64_t i = 0; i < count; ++i) largest = (Bits)(from[i] & mask) > largest ? (Bits)(from[i] & mask) : largest;
    return largest;
}

}  // namespace

extern "C" uint64_t SURGERY_NAME(surgery_largest, SURGERY_SET)(const void* from, void* to, int32_t width, uint64_t mask,
                                                               int64_t count) {
    switch (width) {
        case 1: return largest_of((const uint8_t*)from, (uint8_t*)to, (uint8_t)mask, count);
        case 2: return largest_of((const uint16_t*)from, (uint16_t*)to, (uint16_t)mask, count);
        case 4: return largest_of((const uint32_t*)from, (uint32_t*)to, (uint32_t)mask, count);
        default: return largest_of((const uint64_t*)from, (uint64_t*)to, mask, count);
    }
}
