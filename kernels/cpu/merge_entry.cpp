// The C interface of merge.h. Blocks and rows are independent of one another, so that results do not
// depend on the number of threads.
#include <mutex>

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

int32_t surgery_cpu_products(const MergeLoops* chosen, const Products* job, int32_t threads) {
    const MergeLoops& use = chosen ? *chosen : loops();
    share(blocks_of(job->at), threads, [&use, job](int64_t first, int64_t last) { use.products(job, first, last); });
    return 0;
}

// Threads count for themselves, and what they found is added up.
int32_t surgery_cpu_counting(const MergeLoops* chosen, const Counting* job, int32_t threads) {
    const MergeLoops& use = chosen ? *chosen : loops();
    const int64_t bins = (job->at.count - 1) * (job->digit_count ? job->digit_count * (int64_t)65536 : 32768);
    std::mutex adding;
    share(blocks_of(job->at), threads, [&](int64_t first, int64_t last) {
        if (last - first == blocks_of(job->at)) return use.counting(job, first, last);
        std::vector<int64_t> counts(bins);
        Counting mine = *job;
        mine.counts = counts.data();
        use.counting(&mine, first, last);
        const std::lock_guard<std::mutex> lock(adding);
        for (int64_t b = 0; b < bins; ++b) job->counts[b] += counts[b];
    });
    return 0;
}

int32_t surgery_cpu_divergence(const MergeLoops* chosen, const Divergence* job, int32_t threads) {
    const MergeLoops& use = chosen ? *chosen : loops();
    share(job->at.rows, threads, [&use, job](int64_t first, int64_t last) { use.divergence(job, first, last); });
    return 0;
}

}
