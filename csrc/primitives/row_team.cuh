// Sums over a row, for kernels whose blocks are (threads that share a row) x (rows at a time): either several
// rows of one warp each, or one row of the whole block.
#pragma once
#include "primitives/device.h"

namespace vlk {

constexpr int warp_threads = 32;
constexpr unsigned whole_warp = 0xffffffffu;

// The first column of the k-th group of V, out of N, that a thread holds of its row. A warp holds neighbouring
// columns: a group lies a constant distance behind the one before.
template <int V, int N>
__device__ __forceinline__ int column_of(int k) {
    const int thread = threadIdx.x;
    const int first = (thread / warp_threads * N * warp_threads + thread % warp_threads) * V;
    return first + k * warp_threads * V;
}

// work(k, column) for each of those groups.
template <int V, int N, typename Work>
__device__ __forceinline__ void for_groups(const Work& work) {
#pragma unroll
    for (int k = 0; k < N; ++k) work(k, column_of<V, N>(k));
}

// Every lane gets the same bits.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = warp_threads / 2; distance > 0; distance /= 2)
        value += __shfl_xor_sync(whole_warp, value, distance);
    return value;
}

class RowTeam {
  public:
    // Replaces each value by its sum over the threads of the row; all of them must call.
    template <int Count>
    __device__ __forceinline__ void sum(float (&values)[Count]) {
#pragma unroll
        for (int i = 0; i < Count; ++i) values[i] = warp_sum(values[i]);
        if (blockDim.x > warp_threads) sum_warps(values);
    }

  private:
    // One barrier for each sum: the next one writes the other half of the memory, and nobody reaches the one
    // after it before all have read this.
    template <int Count>
    __device__ __forceinline__ void sum_warps(float (&values)[Count]) {
        VLK_SHARED(float, of_warps, [2][Count][most_warps]);
        const int warp = threadIdx.x / warp_threads, warps = blockDim.x / warp_threads;
        if (threadIdx.x % warp_threads == 0) {
#pragma unroll
            for (int i = 0; i < Count; ++i) of_warps[half_][i][warp] = values[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            values[i] = of_warps[half_][i][0];
            for (int other = 1; other < warps; ++other) values[i] += of_warps[half_][i][other];
        }
        half_ ^= 1;
    }

    static constexpr int most_warps = 16;
    int half_ = 0;
};

}  // namespace vlk
