// The C interface of merge.h. Blocks and rows are independent of one another, so that results do not
// depend on the number of threads.
#include "dispatch.h"
#include "merge.h"

namespace {

const MergeLoops& loops() {
#if defined(__x86_64__)
    if (best_set() == AVX512) return surgery_merge_avx512;
    if (best_set() == AVX2) return surgery_merge_avx2;
#endif
    return surgery_merge_portable;
}

int64_t blocks_of(const Combine& at) { return (at.rows + 127) / 128 * ((at.cols + 127) / 128); }

}  // namespace

extern "C" {

int32_t surgery_cpu_tasks(const MergeLoops* chosen, const Tasks* job, int32_t threads) {
    const MergeLoops& use = chosen ? *chosen : loops();
    share(blocks_of(job->at), threads, [&use, job](int64_t first, int64_t last) { use.tasks(job, first, last); });
    return 0;
}

int32_t surgery_cpu_sizes(const MergeLoops* chosen, const Tasks* job, int32_t threads) {
    const MergeLoops& use = chosen ? *chosen : loops();
    share(blocks_of(job->at), threads, [&use, job](int64_t first, int64_t last) { use.sizes(job, first, last); });
    return 0;
}

int32_t surgery_cpu_fusion(const MergeLoops* chosen, const Fusion* job, int32_t threads) {
    const MergeLoops& use = chosen ? *chosen : loops();
    share(blocks_of(job->at), threads, [&use, job](int64_t first, int64_t last) { use.fusion(job, first, last); });
    return 0;
}

int32_t surgery_cpu_products(const MergeLoops* chosen, const Combine* job, int32_t offset, int32_t threads) {
    const MergeLoops& use = chosen ? *chosen : loops();
    share(blocks_of(*job), threads,
          [&use, job, offset](int64_t first, int64_t last) { use.products(job, offset, first, last); });
    return 0;
}

int32_t surgery_cpu_counting(const MergeLoops* chosen, const Counting* job) {
    (chosen ? *chosen : loops()).counting(job);
    return 0;
}

int32_t surgery_cpu_divergence(const MergeLoops* chosen, const Combine* job, float* out, int32_t threads) {
    const MergeLoops& use = chosen ? *chosen : loops();
    share(job->rows, threads,
          [&use, job, out](int64_t first, int64_t last) { use.divergence(job, out, first, last); });
    return 0;
}

}
