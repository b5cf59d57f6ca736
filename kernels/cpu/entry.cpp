// The C interface: picks the loops for this processor and shares the work out to threads. Rows and
// blocks are independent of one another, so that results do not depend on the number of threads.
#include <atomic>

#include "blocks.h"
#include "dispatch.h"

namespace {

const Loops& loops() {
#if defined(__x86_64__)
    if (best_set() == AVX512) return surgery_loops_avx512;
    if (best_set() == AVX2) return surgery_loops_avx2;
#endif
    return surgery_loops_portable;
}

}  // namespace

extern "C" {

const char* surgery_cpu_isa() {
    const Loops* found = &loops();
    if (found == &surgery_loops_portable) return "portable";
#if defined(__x86_64__)
    if (found == &surgery_loops_avx512) return "avx512";
#endif
    return "avx2";
}

int32_t surgery_cpu_decode(const Loops* chosen, const uint8_t* codes, const float* scales, void* out,
                           int32_t kind, int64_t rows, int64_t cols, int32_t threads) {
    const Loops& use = chosen ? *chosen : loops();
    share(rows, threads, [&use, codes, scales, out, kind, cols](int64_t first, int64_t last) {
        use.decode(codes, scales, out, kind, cols, first, last);
    });
    return 0;
}

int32_t surgery_cpu_combine(const Loops* chosen, const Combine* job, int32_t threads) {
    const Loops& use = chosen ? *chosen : loops();
    const int64_t blocks = (job->rows + 127) / 128 * ((job->cols + 127) / 128);
    share(in_rows(*job) ? job->rows : blocks, threads, [&use, job](int64_t first, int64_t last) { use.combine(job, first, last); });
    return 0;
}

int32_t surgery_cpu_sweep(const Loops* chosen, const surgery::Sweep* job, int32_t threads) {
    const Loops& use = chosen ? *chosen : loops();
    const int64_t tiles = job->batch * ((job->rows + 15) / 16);
    share(tiles, threads, [&use, job](int64_t first, int64_t last) { use.sweep(job, first, last); });
    return 0;
}

int32_t surgery_cpu_largest(const Loops* chosen, const void* from, void* to, int32_t width, uint64_t mask,
                            int64_t count, uint64_t* found, int32_t threads) {
    const Loops& use = chosen ? *chosen : loops();
    std::atomic<uint64_t> largest{0};
    share(count, threads, [&](int64_t first, int64_t last) {
        const char* begin = (const char*)from + first * width;
        char* end = to ? (char*)to + first * width : nullptr;
        const uint64_t here = use.largest(begin, end, width, mask, last - first);
        uint64_t before = largest.load();
        while (before < here && !largest.compare_exchange_weak(before, here)) {
        }
    });
    *found = largest.load();
    return 0;
}

int32_t surgery_cpu_stream(const Loops* chosen, const surgery::Stream* job, int32_t threads) {
    const Loops& use = chosen ? *chosen : loops();
    share(job->rows, threads, [&use, job](int64_t first, int64_t last) { use.packed->stream(job, first, last); });
    return 0;
}

int32_t surgery_cpu_nibbles(const Loops* chosen, const surgery::Nibbles* job, int32_t threads) {
    const Loops& use = chosen ? *chosen : loops();
    const int64_t blocks = (job->count + job->block - 1) / job->block;
    share(blocks, threads, [&use, job](int64_t first, int64_t last) { use.packed->nibbles(job, first, last); });
    return 0;
}

int32_t surgery_cpu_awq(const Loops* chosen, const surgery::AwqWords* job, int32_t threads) {
    const Loops& use = chosen ? *chosen : loops();
    share(job->rows / 8, threads, [&use, job](int64_t first, int64_t last) { use.packed->awq(job, first, last); });
    return 0;
}

int32_t surgery_cpu_to_stream(const Loops* chosen, const surgery::ToStream* job, int32_t threads) {
    const Loops& use = chosen ? *chosen : loops();
    share(job->rows, threads, [&use, job](int64_t first, int64_t last) { use.encode->stream(job, first, last); });
    return 0;
}

int32_t surgery_cpu_to_nibbles(const Loops* chosen, const surgery::ToNibbles* job, int32_t threads) {
    const Loops& use = chosen ? *chosen : loops();
    const int64_t blocks = (job->count + job->block - 1) / job->block;
    share(blocks, threads, [&use, job](int64_t first, int64_t last) { use.encode->nibbles(job, first, last); });
    return 0;
}

}
