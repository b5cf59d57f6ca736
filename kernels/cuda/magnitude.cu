// The largest magnitude among stored values, which may be copied on the way; the C interface of kernels/cpu/entry.cpp,
// with a stream. See kernels/cpu/magnitude.cpp.
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr int THREADS = 256, TOGETHER = 4;

// The larger of two words, each of numbers of WIDTH bytes under `mask`.
template <int WIDTH>
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    return WIDTH == 1 ? __vmaxu4(a, b) : WIDTH == 2 ? __vmaxu2(a, b) : max(a, b);
}

template <int WIDTH>
__device__ __forceinline__ uint64_t largest_in(uint32_t word) {
    if (WIDTH == 4) return word;
    uint32_t found = word >> 16;
    found = max(found, word & 0xFFFFu);
    return WIDTH == 2 ? found : max(max(word & 0xFFu, word >> 8 & 0xFFu), max(word >> 16 & 0xFFu, word >> 24));
}

// 16 bytes at a time where `aligned`; what is left over, one number at a time.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS)
    largest_kernel(const uint8_t* from, uint8_t* to, uint64_t mask, int64_t bytes, bool aligned, unsigned long long* found) {
    const int64_t whole = aligned ? bytes / 16 : 0, step = (int64_t)gridDim.x * THREADS;
    const int64_t thread = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    uint32_t narrow = (uint32_t)mask;
    if (WIDTH == 1) narrow *= 0x01010101u;
    if (WIDTH == 2) narrow *= 0x00010001u;
    uint32_t words = 0;
    uint64_t largest = 0;
    for (int64_t first = thread; first < whole; first += step * TOGETHER) {
        uint4 raw[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            raw[i] = make_uint4(0, 0, 0, 0);
            if (first + i * step < whole) raw[i] = __ldcs((const uint4*)from + first + i * step);
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            if (to && first + i * step < whole) __stcs((uint4*)to + first + i * step, raw[i]);
            if (WIDTH == 8) {
                largest = max(largest, ((uint64_t)raw[i].y << 32 | raw[i].x) & mask);
                largest = max(largest, ((uint64_t)raw[i].w << 32 | raw[i].z) & mask);
            } else {
                words = larger<WIDTH>(larger<WIDTH>(words, raw[i].x & narrow), raw[i].y & narrow);
                words = larger<WIDTH>(larger<WIDTH>(words, raw[i].z & narrow), raw[i].w & narrow);
            }
        }
    }
    for (int64_t at = whole * 16 + thread * WIDTH; at < bytes; at += step * WIDTH) {
        uint64_t number = 0;
#pragma unroll
        for (int b = 0; b < WIDTH; ++b) {
            number |= (uint64_t)from[at + b] << 8 * b;
            if (to) to[at + b] = from[at + b];
        }
        largest = max(largest, number & mask);
    }
    if (WIDTH < 8) largest = max(largest, largest_in<WIDTH>(words));
    for (int lane = 16; lane; lane /= 2) largest = max(largest, (uint64_t)__shfl_xor_sync(~0u, largest, lane));
    if (threadIdx.x % 32 == 0 && largest) atomicMax(found, (unsigned long long)largest);
}

template <int WIDTH>
void launch(const void* from, void* to, uint64_t mask, int64_t count, uint64_t* found, cudaStream_t stream) {
    const int64_t bytes = count * WIDTH, wanted = (bytes / 16 + THREADS * TOGETHER - 1) / (THREADS * TOGETHER);
    const bool aligned = ((uintptr_t)from & 15) == 0 && ((uintptr_t)to & 15) == 0;
    const unsigned blocks = (unsigned)(wanted < 1 ? 1 : wanted < 8192 ? wanted : 8192);
    largest_kernel<WIDTH><<<blocks, THREADS, 0, stream>>>((const uint8_t*)from, (uint8_t*)to, mask, bytes, aligned,
                                                         (unsigned long long*)found);
}

}  // namespace

extern "C" int32_t surgery_cuda_largest(const void* from, void* to, int32_t width, uint64_t mask, int64_t count,
                                        uint64_t* found, cudaStream_t stream) {
    const cudaError_t status = cudaMemsetAsync(found, 0, sizeof(uint64_t), stream);
    if (status != cudaSuccess) return status;
    switch (width) {
        case 1: launch<1>(from, to, mask, count, found, stream); break;
        case 2: launch<2>(from, to, mask, count, found, stream); break;
        case 4: launch<4>(from, to, mask, count, found, stream); break;
        default: launch<8>(from, to, mask, count, found, stream); break;
    }
    return cudaGetLastError();
}
