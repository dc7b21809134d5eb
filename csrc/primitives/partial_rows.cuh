// The end of a sum over rows: a block writes what its threads hold as a partial row, and partial rows are added in an
// order that depends on their number alone.
#pragma once
#include "primitives/device_vector.cuh"
#include "primitives/partial_rows.h"
#include "primitives/row_team.cuh"

namespace vlk {

// Adds what the block's rows hold, in their order, and writes it to `partial`.
template <int V, int N>
__device__ __forceinline__ void write_block_sum(const float (&sums)[N][V], int width, float* partial) {
    VLK_DYNAMIC_SHARED(of_rows);
    const int threads = blockDim.x * blockDim.y;
    for_groups<V, N>([&](int k, int column) {
#pragma unroll
        for (int i = 0; i < V; ++i)
            if (column < width) of_rows[threadIdx.y * width + column + i] = sums[k][i];
    });
    __syncthreads();
    for (int column = threadIdx.y * blockDim.x + threadIdx.x; column < width; column += threads) {
        float sum = of_rows[column];
        for (int row = 1; row < static_cast<int>(blockDim.y); ++row) sum += of_rows[row * width + column];
        partial[column] = sum;
    }
    __syncthreads();
}

constexpr int partial_row_threads = warp_threads;  // in both directions

// A block takes 32 columns of one part. Each of its 32 warps adds every 32nd partial row; then a warp adds, for
// one column, what the warps have.
template <int Parts>
__global__ void __launch_bounds__(partial_row_threads* partial_row_threads)
    partial_rows_kernel(const __grid_constant__ PartialRows<Parts> op) {
    VLK_SHARED(float, of_warps, [partial_row_threads][partial_row_threads + 1]);  // the gap spreads a column over banks
    const Gradient& gradient = op.gradients[blockIdx.y];
    if (!gradient.data) return;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * partial_row_threads, column = first + threadIdx.x;
    float sum = 0.0f;
    if (column < op.width)
        for (int64_t row = threadIdx.y; row < op.count; row += partial_row_threads)
            sum += op.partials[(row * Parts + blockIdx.y) * op.width + column];
    of_warps[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    sum = warp_sum(of_warps[threadIdx.x][threadIdx.y]);
    const int64_t summed = first + threadIdx.y;
    if (threadIdx.x != 0 || summed >= op.width) return;
    if (gradient.dtype == Dtype::float32) static_cast<float*>(gradient.data)[summed] = sum;
    if (gradient.dtype == Dtype::bfloat16)
        static_cast<bfloat16*>(gradient.data)[summed] = from_float<bfloat16>(sum);
    if (gradient.dtype == Dtype::float16) static_cast<float16*>(gradient.data)[summed] = from_float<float16>(sum);
}

template <int Parts, typename Launch>
void launch_partial_rows(const PartialRows<Parts>& op, const Launch& launch) {
    const int64_t blocks = (op.width + partial_row_threads - 1) / partial_row_threads;
    if (blocks == 0) return;
    launch(partial_rows_kernel<Parts>, dim3(static_cast<unsigned>(blocks), Parts),
           dim3(partial_row_threads, partial_row_threads), int64_t{0}, op);
}

}  // namespace vlk
