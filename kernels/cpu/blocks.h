// The loops over one run of rows or blocks, compiled once for each instruction set.
#pragma once
#include "../core/encode.h"
#include "../core/packed.h"

// Parents of a weighted sum and where it goes. Matrices are [rows, cols], row-major; scales and
// sums lie by 128 x 128 block, [ceil(rows/128), ceil(cols/128)] and [blocks, count].
struct Combine {
    const void* const* parents;
    const int32_t* kinds;
    const float* const* scales;
    const float* weights;
    int32_t count;
    void* out;          // null: only the sums
    int32_t out_kind;
    float* out_scales;  // FP8 blocks only
    double* sums;       // null: none; else |p0|^2, |p0 - p1|^2, ...
    int64_t rows, cols;
    int32_t ue8m0;
};

// What is shared out to threads: rows where nothing needs whole blocks, else blocks.
inline bool in_rows(const Combine& job) { return job.out && job.out_kind != surgery::FP8_BLOCK && !job.sums; }

struct PackedLoops {
    void (*stream)(const surgery::Stream*, int64_t, int64_t);
    void (*nibbles)(const surgery::Nibbles*, int64_t, int64_t);
    void (*awq)(const surgery::AwqWords*, int64_t, int64_t);
};

struct EncodeLoops {
    void (*stream)(const surgery::ToStream*, int64_t, int64_t);
    void (*nibbles)(const surgery::ToNibbles*, int64_t, int64_t);
};

struct Loops {
    void (*decode)(const uint8_t*, const float*, void*, int32_t, int64_t, int64_t, int64_t);
    void (*combine)(const Combine*, int64_t, int64_t);
    void (*sweep)(const surgery::Sweep*, int64_t, int64_t);
    const PackedLoops* packed;
    const EncodeLoops* encode;
    // Largest of the bits under `mask` among `count` numbers of `width` bytes, which are copied unless `to` is null.
    uint64_t (*largest)(const void*, void*, int32_t, uint64_t, int64_t);
};

// SURGERY_SET is the instruction set of a build of the loops: portable, avx2 or avx512.
#ifdef SURGERY_SET
#define SURGERY_JOIN(name, set) name##_##set
#define SURGERY_NAME(name, set) SURGERY_JOIN(name, set)
#define SURGERY_LOOPS SURGERY_NAME(surgery_loops, SURGERY_SET)
#define SURGERY_SWEEP SURGERY_NAME(surgery_sweep, SURGERY_SET)
#define SURGERY_PACKED SURGERY_NAME(surgery_packed, SURGERY_SET)
#define SURGERY_AWQ SURGERY_NAME(surgery_awq, SURGERY_SET)
#define SURGERY_ENCODE SURGERY_NAME(surgery_encode, SURGERY_SET)
extern "C" void SURGERY_SWEEP(const surgery::Sweep*, int64_t, int64_t);
extern "C" void SURGERY_AWQ(const surgery::AwqWords*, int64_t, int64_t);
extern "C" uint64_t SURGERY_NAME(surgery_largest, SURGERY_SET)(const void*, void*, int32_t, uint64_t, int64_t);
extern "C" {
extern const PackedLoops SURGERY_PACKED;
extern const EncodeLoops SURGERY_ENCODE;
}
#endif

extern "C" {
extern const Loops surgery_loops_portable, surgery_loops_avx2, surgery_loops_avx512;
}
