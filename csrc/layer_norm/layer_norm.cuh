// The CUDA kernels of LayerNorm and RMSNorm: a row lies in the registers of the threads that share it, and every tensor is
// read and written once. Compiled by nvcc from layer_norm.cu and by the emulator.
#pragma once
#include "layer_norm/layer_norm_plan.h"
#include "layer_norm/layer_norm_wide.cuh"
#include "primitives/device_dropout.cuh"
#include "primitives/held_row.cuh"
#include "primitives/held_row_shapes.cuh"
#include "primitives/moments.cuh"
#include "primitives/partial_rows.cuh"

namespace vlk {

// z from x, rounded as it is stored: y is the norm of exactly that z.
template <typename T, int V, int N>
__device__ __forceinline__ void build_sum(const LayerNormForward& op, uint32_t kept, int64_t row,
                                          HeldRow<T, V, N>& residual, float (&z)[N][V]) {
    const int width = static_cast<int>(op.width);
    with_parameter<T, V, N>(op.linear_bias, width, [&](int k, const float (&bias)[V]) {
#pragma unroll
        for (int i = 0; i < V; ++i) z[k][i] += bias[i];
    });
    if (op.dropout.threshold)
        for_held<V, N>([&](int k, int i) { z[k][i] = kept >> (k * V + i) & 1 ? z[k][i] : 0.0f; });
    const float factor = row_factor(op.dropout, op.row_scale, row);
    for_held<V, N>([&](int k, int i) { z[k][i] *= factor; });
    if (op.residual) {
        if (!early<V>) residual.load(op.residual, row * op.width, width);
        for_held<V, N>([&](int k, int i) { z[k][i] += to_float(residual.at[k].at[i]); });
    }
    T* to = static_cast<T*>(op.z) + row * op.width;
    for_groups<V, N>([&](int k, int column) {
        const Vector<T, V> rounded = narrow<T, V>(z[k]);
        widen<T, V>(rounded, z[k]);
        if (op.z && column < width) store_vector(to + column, rounded);
    });
}

// z becomes (z - mean) * rstd * weight + bias and is written to y.
template <typename T, int V, int N>
__device__ __forceinline__ void write_norm(const LayerNormForward& op, Moments m, int64_t row, float (&z)[N][V]) {
    const int width = static_cast<int>(op.width);
    for_held<V, N>([&](int k, int i) { z[k][i] = (z[k][i] - m.mean) * m.rstd; });
    with_parameter<T, V, N>(op.weight, width, [&](int k, const float (&weight)[V]) {
#pragma unroll
        for (int i = 0; i < V; ++i) z[k][i] *= weight[i];
    });
    with_parameter<T, V, N>(op.bias, width, [&](int k, const float (&bias)[V]) {
#pragma unroll
        for (int i = 0; i < V; ++i) z[k][i] += bias[i];
    });
    store_row<T, V, N>(op.y, row * op.width, width, z);
}

template <typename T, int V, int N>
__device__ __forceinline__ void forward_row(const LayerNormForward& op, const DropoutDraw& draw, int64_t row,
                                            RowTeam& team) {
    const int width = static_cast<int>(op.width);
    const int64_t start = row * op.width;
    HeldRow<T, V, N> x, residual;
    x.load(op.x, start, width);
    if (op.residual && early<V>) residual.load(op.residual, start, width);
    const uint32_t kept = op.dropout.threshold ? draw.kept_columns<V, N>(row, width) : 0;
    float z[N][V];
    for_groups<V, N>([&](int k, int) { widen<T, V>(x.at[k], z[k]); });
    if (is_fused(op)) build_sum<T, V, N>(op, kept, row, residual, z);
    const Moments m = moments<V, N>(z, op.mean, width, op.eps, team);
    if (threadIdx.x == 0) keep_moments(op, row, m);
    write_norm<T, V, N>(op, m, row, z);
}

template <typename T, int V, int N>
__global__ void __launch_bounds__(forward_threads(V * N), 1)
    layer_norm_forward_kernel(const LayerNormForward op) {
    RowTeam team;
    const DropoutDraw draw(op.dropout);
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < op.rows; row += step)
        forward_row<T, V, N>(op, draw, row, team);
}

// One row of the gradients; adds the row's share to the sums of dweight, dbias and dlinear_bias.
template <typename T, int V, int N>
__device__ __forceinline__ void backward_row(const LayerNormBackward& op, const DropoutDraw& draw, int64_t row,
                                             RowTeam& team, float (&sums)[3][N][V]) {
    const int width = static_cast<int>(op.width);
    const int64_t start = row * op.width;
    HeldRow<T, V, N> dy, z, dsum;
    dy.load(op.dy, start, width);
    z.load(op.z, start, width);
    if (op.dsum && early<V>) dsum.load(op.dsum, start, width);
    const uint32_t kept = op.dropout.threshold ? draw.kept_columns<V, N>(row, width) : 0;
    const Moments m = moments_of(op, row);
    const auto xhat = [&](int k, int i) { return (to_float(z.at[k].at[i]) - m.mean) * m.rstd; };
    float g[N][V];
    for_groups<V, N>([&](int k, int) { widen<T, V>(dy.at[k], g[k]); });
    for_held<V, N>([&](int k, int i) {
        sums[0][k][i] += g[k][i] * xhat(k, i);
        sums[1][k][i] += g[k][i];
    });
    with_parameter<T, V, N>(op.weight, width, [&](int k, const float (&weight)[V]) {
#pragma unroll
        for (int i = 0; i < V; ++i) g[k][i] *= weight[i];
    });
    float means[2] = {0.0f, 0.0f};  // of g and of g * xhat
    for_held<V, N>([&](int k, int i) {
        means[0] += g[k][i];
        means[1] += g[k][i] * xhat(k, i);
    });
    team.sum(means);
    means[0] = op.mean ? means[0] / static_cast<float>(width) : 0.0f;
    means[1] /= static_cast<float>(width);
    for_held<V, N>([&](int k, int i) { g[k][i] = (g[k][i] - means[0] - xhat(k, i) * means[1]) * m.rstd; });
    if (op.dsum) {
        if (!early<V>) dsum.load(op.dsum, start, width);
        for_held<V, N>([&](int k, int i) { g[k][i] += to_float(dsum.at[k].at[i]); });
    }
    store_row<T, V, N>(op.dz, start, width, g);
    if (op.dx) {
        if (op.dropout.threshold)
            for_held<V, N>([&](int k, int i) { g[k][i] = kept >> (k * V + i) & 1 ? g[k][i] : 0.0f; });
        const float factor = row_factor(op.dropout, op.row_scale, row);
        for_held<V, N>([&](int k, int i) { g[k][i] *= factor; });
        store_row<T, V, N>(op.dx, start, width, g);
    }
    if (op.sum_dx) for_held<V, N>([&](int k, int i) { sums[2][k][i] += g[k][i]; });
}

template <int V, int N>
__device__ __forceinline__ void write_partial_row(const LayerNormBackward& op, const float (&sums)[3][N][V]) {
    const int width = static_cast<int>(op.width);
    float* partial = op.partials + static_cast<int64_t>(blockIdx.x) * 3 * width;
#pragma unroll
    for (int part = 0; part < 3; ++part) {
        if (part == 1 && !op.mean) continue;
        if (part == 2 && !op.sum_dx) return;
        write_block_sum<V, N>(sums[part], width, partial + part * width);
    }
}

template <typename T, int V, int N>
__global__ void __launch_bounds__(backward_threads(V, N), 1)
    layer_norm_backward_kernel(const LayerNormBackward op) {
    RowTeam team;
    const DropoutDraw draw(op.dropout);
    float sums[3][N][V] = {};
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < op.rows; row += step)
        backward_row<T, V, N>(op, draw, row, team, sums);
    write_partial_row<V, N>(op, sums);
}

// launch(kernel, grid, block, shared bytes, op): nvcc's launch, or the emulator's.
template <typename Launch>
void launch_layer_norm_forward(const LayerNormForward& op, const Launch& launch) {
    const RowPlan plan = plan_forward(op);
    const dim3 grid(static_cast<unsigned>(plan.blocks)), block(plan.threads, plan.rows_per_block);
    if (plan.blocks > 0 && plan.vectors > 0)
        visit_shape(op.dtype, plan, [&](auto shape) {
            using S = decltype(shape);
            launch(layer_norm_forward_kernel<typename S::Element, S::columns, S::vectors>, grid, block,
                   plan.shared_bytes, op);
        });
    else if (plan.blocks > 0)
        visit_element(op.dtype, [&](auto element) {
            launch(layer_norm_forward_wide_kernel<decltype(element)>, grid, block, plan.shared_bytes, op);
        });
}

// The gradients of weight, bias and linear_bias come from op.partials by a launch of their own.
template <typename Launch>
void launch_layer_norm_backward(const LayerNormBackward& op, const PartialRows<3>& sums, const Launch& launch) {
    const RowPlan plan = plan_backward(op);
    const dim3 grid(static_cast<unsigned>(plan.blocks)), block(plan.threads, plan.rows_per_block);
    if (plan.blocks > 0 && plan.vectors > 0)
        visit_shape(op.dtype, plan, [&](auto shape) {
            using S = decltype(shape);
            launch(layer_norm_backward_kernel<typename S::Element, S::columns, S::vectors>, grid, block,
                   plan.shared_bytes, op);
        });
    else if (plan.blocks > 0)
        visit_columns(op.dtype, plan, [&](auto shape) {
            using S = decltype(shape);
            launch(layer_norm_backward_wide_kernel<typename S::Element, S::columns>, grid, block,
                   plan.shared_bytes, op);
        });
    launch_partial_rows(sums, launch);
}

}  // namespace vlk
