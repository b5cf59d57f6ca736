// Sums over whole blocks in the CPU's order.
#pragma once
#include <cuda_runtime.h>

#include "../cpu/merge.h"

namespace surgery {

// Dot products of vectors as `surgery.codecs.merges.task_sums` has them, into job.sums.
cudaError_t add_task_sums(const Combine& job, cudaStream_t stream);

}  // namespace surgery
