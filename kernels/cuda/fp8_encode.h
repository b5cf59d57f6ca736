// One aligned matrix of bf16 or float32 to FP8 blocks.
#pragma once
#include <cuda_runtime.h>

#include "../cpu/blocks.h"

namespace surgery {

// Whether encode_fp8 does this one: a sole parent with the weight 1, without sums of squares.
bool takes_encoding(const Combine& work);
cudaError_t encode_fp8(const Combine& work, cudaStream_t stream);

}  // namespace surgery
