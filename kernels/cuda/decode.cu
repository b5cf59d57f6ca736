// FP8 blocks to bf16 and float32 on CUDA; the C interface of kernels/cpu/entry.cpp, with a stream.
//
// One thread block decodes one 128 x 128 block. Threads are mapped to the output: each makes 16 bytes of it at a time, so
// that a warp stores four whole 128-byte lines. Built with -fmad=false.
#include "store.cuh"

using namespace surgery;

namespace {

constexpr int THREADS = 256;

// Each store writes 16 bytes beside its neighbour's, hence 8 codes a load for bf16 and 4 for float32.
template <int KIND>
__global__ void __launch_bounds__(THREADS)
    decode_kernel(const uint8_t* codes, const float* scales, void* out, int64_t rows, int64_t cols,
                  int64_t across, bool aligned) {
    constexpr int WIDE = KIND == BF16 ? 8 : 4, LANES = BLOCK / WIDE, STEP = THREADS / LANES;
    const float scale = scales[blockIdx.x];
    const int64_t down = blockIdx.x / across;
    const int64_t row = down * BLOCK + threadIdx.x / LANES;
    const int64_t col = (blockIdx.x - down * across) * BLOCK + threadIdx.x % LANES * WIDE;
    const int64_t at = row * cols + col;
    if (aligned && down * BLOCK + BLOCK <= rows && col + WIDE <= cols) {
        constexpr int BATCH = 8;
#pragma unroll
        for (int first = 0; first < BLOCK / STEP; first += BATCH) {
            uint32_t words[BATCH][WIDE / 4];
#pragma unroll
            for (int r = 0; r < BATCH; ++r) {
                const uint8_t* from = codes + at + (first + r) * (STEP * cols);
                if (WIDE == 8) {
                    const uint2 two = __ldcs((const uint2*)from);
                    words[r][0] = two.x, words[r][WIDE / 4 - 1] = two.y;
                } else {
                    words[r][0] = __ldcs((const uint32_t*)from);
                }
            }
#pragma unroll
            for (int r = 0; r < BATCH; ++r) {
                float v[8];
#pragma unroll
                for (int g = 0; g < WIDE / 4; ++g) unpack4(words[r][g], v + 4 * g);
#pragma unroll
                for (int i = 0; i < WIDE; ++i) v[i] = __fmul_rn(v[i], scale);
                const int64_t to = at + (first + r) * (STEP * cols);
                if (KIND == BF16)
                    __stcs((uint4*)((uint16_t*)out + to), make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]),
                                                                      pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])));
                else
                    __stcs((float4*)((float*)out + to), make_float4(v[0], v[1], v[2], v[3]));
            }
        }
        return;
    }
    for (int64_t r = row; r < rows && r < down * BLOCK + BLOCK; r += STEP)
        for (int i = 0; i < WIDE && col + i < cols; ++i) {
            const float value = __fmul_rn(e4m3_to_float(codes[r * cols + col + i]), scale);
            if (KIND == BF16) ((uint16_t*)out)[r * cols + col + i] = float_to_bf16(value);
            else ((float*)out)[r * cols + col + i] = value;
        }
}

}  // namespace

extern "C" {

const char* surgery_cuda_error(int32_t status) { return cudaGetErrorString((cudaError_t)status); }

int32_t surgery_cuda_decode(const uint8_t* codes, const float* scales, void* out, int32_t kind, int64_t rows,
                            int64_t cols, cudaStream_t stream) {
    const int64_t across = (cols + BLOCK - 1) / BLOCK, blocks = (rows + BLOCK - 1) / BLOCK * across;
    if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
    const bool aligned = cols % 16 == 0 && even(codes) && even(out);
    if (kind == BF16)
        decode_kernel<BF16><<<(unsigned)blocks, THREADS, 0, stream>>>(codes, scales, out, rows, cols, across, aligned);
    else
        decode_kernel<F32><<<(unsigned)blocks, THREADS, 0, stream>>>(codes, scales, out, rows, cols, across, aligned);
    return cudaGetLastError();
}

}
