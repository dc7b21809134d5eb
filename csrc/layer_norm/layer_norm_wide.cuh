// Rows that do not lie in registers; a block takes one at a time, and every column belongs to one thread.
//
// The forward of single columns keeps z in shared memory. The backward, whose sums have no room beside a row, reads
// it twice, the second time from a cache: its sums of dweight and dbias lie in shared memory, that of dlinear_bias
// in its partial row.
#pragma once
#include "layer_norm/layer_norm_plan.h"
#include "primitives/device_dropout.cuh"
#include "primitives/moments.cuh"

namespace vlk {

__device__ __forceinline__ void keep_moments(const LayerNormForward& op, int64_t row, Moments m) {
    if (op.mean) op.mean[row] = m.mean;
    op.rstd[row] = m.rstd;
}

__device__ __forceinline__ Moments moments_of(const LayerNormBackward& op, int64_t row) {
    return {op.mean ? op.mean[row] : 0.0f, op.rstd[row]};
}

__device__ __forceinline__ float row_factor(const Dropout& dropout, const float* row_scale, int64_t row) {
    return keep_scale(dropout) * (row_scale ? row_scale[row] : 1.0f);
}

// work(column) for every group of V columns of this thread.
template <int V, typename Work>
__device__ __forceinline__ void for_own_columns(int width, const Work& work) {
    for (int column = threadIdx.x * V; column < width; column += blockDim.x * V) work(column);
}

// z of one column, rounded as it is stored.
template <typename T>
__device__ __forceinline__ float wide_sum(const LayerNormForward& op, const DropoutDraw& draw, int64_t row, int column) {
    const int64_t at = row * op.width + column;
    float z[1], bias[1];
    load_floats<T, 1>(static_cast<const T*>(op.x) + at, z);
    if (!is_fused(op)) return z[0];
    if (op.linear_bias.data) {
        load_parameter<T, 1>(op.linear_bias, column, bias);
        z[0] += bias[0];
    }
    if (op.dropout.threshold) z[0] = draw.kept_group<1>(row, column) ? z[0] : 0.0f;
    z[0] *= row_factor(op.dropout, op.row_scale, row);
    if (op.residual) z[0] += to_float(static_cast<const T*>(op.residual)[at]);
    const T rounded = from_float<T>(z[0]);
    if (op.z) static_cast<T*>(op.z)[at] = rounded;
    return to_float(rounded);
}

template <typename T>
__device__ __forceinline__ void write_wide_norm(const LayerNormForward& op, Moments m, int64_t row, int column, float z) {
    float y = (z - m.mean) * m.rstd, parameter[1];
    if (op.weight.data) {
        load_parameter<T, 1>(op.weight, column, parameter);
        y *= parameter[0];
    }
    if (op.bias.data) {
        load_parameter<T, 1>(op.bias, column, parameter);
        y += parameter[0];
    }
    static_cast<T*>(op.y)[row * op.width + column] = from_float<T>(y);
}

template <typename T>
__global__ void __launch_bounds__(most_threads) layer_norm_forward_wide_kernel(const LayerNormForward op) {
    VLK_DYNAMIC_SHARED(z);
    const int width = static_cast<int>(op.width);
    RowTeam team;
    const DropoutDraw draw(op.dropout);
    for (int64_t row = blockIdx.x; row < op.rows; row += gridDim.x) {
        float sum[1] = {0.0f}, squares[1] = {0.0f};
        for_own_columns<1>(width, [&](int column) { sum[0] += z[column] = wide_sum<T>(op, draw, row, column); });
        team.sum(sum);
        const float mean = op.mean ? sum[0] / static_cast<float>(width) : 0.0f;
        for_own_columns<1>(width, [&](int column) { squares[0] += (z[column] - mean) * (z[column] - mean); });
        team.sum(squares);
        const Moments m{mean, rstd_of(squares[0], width, op.eps)};
        if (threadIdx.x == 0) keep_moments(op, row, m);
        for_own_columns<1>(width, [&](int column) { write_wide_norm<T>(op, m, row, column, z[column]); });
    }
}

// g = dy * weight and xhat of one group.
template <typename T, int V>
struct WideGroup {
    float dy[V], g[V], xhat[V];

    __device__ __forceinline__ WideGroup(const LayerNormBackward& op, int64_t start, Moments m, int column) {
        float z[V], weight[V];
        load_floats<T, V>(static_cast<const T*>(op.dy) + start + column, dy);
        load_floats<T, V>(static_cast<const T*>(op.z) + start + column, z);
        if (op.weight.data) load_parameter<T, V>(op.weight, column, weight);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            xhat[i] = (z[i] - m.mean) * m.rstd;
            g[i] = op.weight.data ? dy[i] * weight[i] : dy[i];
        }
    }
};

// The means of g and of g * xhat; adds the row's share to the sums of dweight and dbias.
template <typename T, int V>
__device__ __forceinline__ void wide_means(const LayerNormBackward& op, int64_t start, Moments m, RowTeam& team,
                                           float* dweight, float* dbias, float (&means)[2]) {
    const int width = static_cast<int>(op.width);
    for_own_columns<V>(width, [&](int column) {
        const WideGroup<T, V> group(op, start, m, column);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            dweight[column + i] += group.dy[i] * group.xhat[i];
            dbias[column + i] += group.dy[i];
            means[0] += group.g[i];
            means[1] += group.g[i] * group.xhat[i];
        }
    });
    team.sum(means);
    means[0] = op.mean ? means[0] / static_cast<float>(width) : 0.0f;
    means[1] /= static_cast<float>(width);
}

// Writes dz and dx of one group, adds to the sum of dlinear_bias.
template <typename T, int V>
__device__ __forceinline__ void write_wide_group(const LayerNormBackward& op, const DropoutDraw& draw, int64_t row,
                                                 int column, float (&gradient)[V], float* dlinear_bias) {
    const int64_t at = row * op.width + column;
    if (op.dsum) {
        float dsum[V];
        load_floats<T, V>(static_cast<const T*>(op.dsum) + at, dsum);
#pragma unroll
        for (int i = 0; i < V; ++i) gradient[i] += dsum[i];
    }
    store_vector(static_cast<T*>(op.dz) + at, narrow<T, V>(gradient));
    if (op.dx) {
        const uint32_t kept = op.dropout.threshold ? draw.kept_group<V>(row, column) : ~0u;
        const float factor = row_factor(op.dropout, op.row_scale, row);
#pragma unroll
        for (int i = 0; i < V; ++i) gradient[i] = (kept >> i & 1 ? gradient[i] : 0.0f) * factor;
        store_vector(static_cast<T*>(op.dx) + at, narrow<T, V>(gradient));
    }
    if (op.sum_dx) {
#pragma unroll
        for (int i = 0; i < V; ++i) dlinear_bias[column + i] += gradient[i];
    }
}

template <typename T, int V>
__global__ void __launch_bounds__(most_threads) layer_norm_backward_wide_kernel(const LayerNormBackward op) {
    VLK_DYNAMIC_SHARED(sums);
    const int width = static_cast<int>(op.width);
    float* partial = op.partials + static_cast<int64_t>(blockIdx.x) * 3 * width;
    float *dweight = sums, *dbias = sums + width, *dlinear_bias = partial + 2 * width;
    for_own_columns<V>(width, [&](int column) {
        for (int i = column; i < column + V; ++i) dweight[i] = dbias[i] = dlinear_bias[i] = 0.0f;
    });
    RowTeam team;
    const DropoutDraw draw(op.dropout);
    for (int64_t row = blockIdx.x; row < op.rows; row += gridDim.x) {
        const Moments m = moments_of(op, row);
        float means[2] = {0.0f, 0.0f};
        wide_means<T, V>(op, row * op.width, m, team, dweight, dbias, means);
        for_own_columns<V>(width, [&](int column) {
            const WideGroup<T, V> group(op, row * op.width, m, column);
            float gradient[V];
#pragma unroll
            for (int i = 0; i < V; ++i) gradient[i] = (group.g[i] - means[0] - group.xhat[i] * means[1]) * m.rstd;
            write_wide_group<T, V>(op, draw, row, column, gradient, dlinear_bias);
        });
    }
    for_own_columns<V>(width, [&](int column) {
        for (int i = column; i < column + V; ++i) {
            partial[i] = dweight[i];
            partial[width + i] = dbias[i];
        }
    });
}

}  // namespace vlk
