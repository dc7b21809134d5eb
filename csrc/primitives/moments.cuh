// The moments of a row in registers, for CUDA kernels.
#pragma once
#include "primitives/held_row.cuh"

namespace vlk {

struct Moments {
    float mean, rstd;
};

__device__ __forceinline__ float rstd_of(float squares, int width, float eps) {
    return 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
}

// Two passes: the squares are of differences from the mean, so a large mean costs no accuracy. What is
// not centered has the mean 0; a branch around its sum would cost LayerNorm registers that it does not have.
template <int V, int N>
__device__ __forceinline__ Moments moments(const float (&z)[N][V], bool centered, int width, float eps,
                                           RowTeam& team) {
    float sum[1] = {0.0f}, squares[1] = {0.0f};
    for_held<V, N>([&](int k, int i) { sum[0] += z[k][i]; });
    team.sum(sum);
    const float mean = centered ? sum[0] / static_cast<float>(width) : 0.0f;
    for_groups<V, N>([&](int k, int column) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float difference = column < width ? z[k][i] - mean : 0.0f;
            squares[0] += difference * difference;
        }
    });
    team.sum(squares);
    return {mean, rstd_of(squares[0], width, eps)};
}

}  // namespace vlk
