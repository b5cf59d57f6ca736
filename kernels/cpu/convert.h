// Runs of values on their way to memory as bf16 or float32.
#pragma once
#include "../core/bits.h"

// Unnamed: each instruction set has its own, and the linker must not take one for another.
namespace surgery {
namespace {

template <typename Value>
inline __attribute__((always_inline)) void convert(void* out, int32_t kind, int64_t at, int count, Value value) {
    if (kind == BF16) {
        uint16_t* __restrict to = (uint16_t*)out + at;
#pragma GCC ivdep
        for (int i = 0; i < count; ++i) to[i] = float_to_bf16(value(i));
    } else {
        float* __restrict to = (float*)out + at;
#pragma GCC ivdep
        for (int i = 0; i < count; ++i) to[i] = value(i);
    }
}

}  // namespace
}  // namespace surgery
