// Weighted sums of aligned FP8 parents alone.
#pragma once
#include <cuda_runtime.h>

#include "../cpu/blocks.h"

namespace surgery {

// Whether add_fp8 does this one: to FP8 blocks, or two parents to bf16 without sums of squares.
bool takes_fp8_sum(const Combine& work);
cudaError_t add_fp8(const Combine& work, cudaStream_t stream);

}  // namespace surgery
