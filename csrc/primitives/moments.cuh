// The moments of a row in registers, for CUDA kernels.
#pragma once
#include "primitives/held_row.cuh"

namespace vlk {

struct Moments {
    float mean, rstd;
};

// Two passes: the squares are of differences from the mean, so a large mean costs no accuracy. What is
// not centered has the mean 0.
template <int V, int N>
__device__ __forceinline__ Moments moments(const float (&z)[N][V], bool centered, int width, float eps,
                                           RowTeam& team) {
    float sum[1] = {0.0f}, squares[1] = {0.0f};
    if (centered) {
        for_held<V, N>([&](int k, int i) { sum[0] += z[k][i]; });
        team.sum(sum);
    }
    const float mean = sum[0] / static_cast<float>(width);
    for_groups<V, N>([&](int k, int column) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float difference = column < width ? z[k][i] - mean : 0.0f;
            squares[0] += difference * difference;
        }
    });
    team.sum(squares);
    return {mean, 1.0f / sqrtf(squares[0] / static_cast<float>(width) + eps)};
}

}  // namespace vlk
