// The norms of an embedding sum's rows, for CUDA kernels.
#pragma once
#include "embed_layer_norm/embed_layer_norm.h"
#include "primitives/row_team.cuh"

namespace vlk {

// One norm's row of a parameter.
__device__ __forceinline__ Parameter row_of(const Parameter& parameter, int64_t norm, int64_t width) {
    const int64_t bytes = norm * width * (parameter.dtype == Dtype::float32 ? 4 : 2);
    return {parameter.data ? static_cast<const char*>(parameter.data) + bytes : nullptr, parameter.dtype};
}

__device__ __forceinline__ int64_t checked_norm(const RowNorms& norms, int64_t row) {
    const int64_t norm = norm_of(norms, row);
    VLK_REQUIRE(-1 <= norm && norm < norms.count, "norm_ids of embed_layer_norm must be -1 or rows of weight");
    return norm;
}

// work(row) for those rows of this team that take `norm` (-1: none). A lane looks at every 32nd of them.
template <typename Work>
__device__ __forceinline__ void for_rows_of(const RowNorms& norms, int64_t norm, int64_t rows, const Work& work) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    const int lane = threadIdx.x % warp_threads;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; first < rows;
         first += warp_threads * step) {
        const int64_t own = first + lane * step, taken = own < rows ? norm_of(norms, own) : norms.count;
        uint32_t left = __ballot_sync(whole_warp, taken == norm || (taken < 0 && norm < 0));
        for (; left; left &= left - 1) work(first + (__ffs(left) - 1) * step);
    }
}

}  // namespace vlk
