// Which build of the loops serves this processor, and how work is shared out to threads.
#pragma once
#include <stdint.h>

#include <thread>
#include <vector>

enum Set { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

inline Set best_set() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return AVX512;
    if (__builtin_cpu_supports("avx2")) return AVX2;
#endif
    return PORTABLE;
}

template <typename Work>
void share(int64_t items, int32_t threads, Work work) {
    if (threads > items) threads = (int32_t)items;
    if (threads <= 1) {
        work((int64_t)0, items);
        return;
    }
    std::vector<std::thread> others;
    for (int32_t t = 1; t < threads; ++t)
        others.emplace_back(work, items * t / threads, items * (t + 1) / threads);
    work((int64_t)0, items / threads);
    for (auto& other : others) other.join();
}
