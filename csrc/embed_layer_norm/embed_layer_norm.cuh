// The CUDA kernels of a LayerNorm of a sum of embeddings: the rows of the tables are added in the registers of the
// threads that share a row, and every tensor is read and written once. Compiled by nvcc from embed_layer_norm.cu and
// by the emulator.
#pragma once
#include "embed_layer_norm/embed_layer_norm_plan.h"
#include "embed_layer_norm/embed_layer_norm_wide.cuh"
#include "embed_layer_norm/row_norms.cuh"
#include "embed_layer_norm/row_terms.cuh"
#include "primitives/device_dropout.cuh"
#include "primitives/held_row.cuh"
#include "primitives/held_row_shapes.cuh"
#include "primitives/moments.cuh"
#include "primitives/partial_rows.cuh"

namespace vlk {

// Sets what dropout drops to zero and scales the rest.
template <int V, int N>
__device__ __forceinline__ void drop(const Dropout& dropout, uint32_t kept, float (&values)[N][V]) {
    if (!dropout.threshold) return;
    const float scale = keep_scale(dropout);
    for_held<V, N>([&](int k, int i) { values[k][i] = kept >> (k * V + i) & 1 ? values[k][i] * scale : 0.0f; });
}

template <typename T, int V, int N>
__device__ __forceinline__ void store_zeros(void* data, int64_t start, int width) {
    const float zeros[N][V] = {};
    store_row<T, V, N>(data, start, width, zeros);
}

// z becomes dropout((z - mean) * rstd * weight + bias) and is written to y.
template <typename T, int V, int N>
__device__ __forceinline__ void write_norm(const EmbedLayerNormForward& op, Moments m, int64_t row, int64_t norm,
                                           uint32_t kept, float (&z)[N][V]) {
    const int width = static_cast<int>(op.sum.width);
    for_held<V, N>([&](int k, int i) { z[k][i] = (z[k][i] - m.mean) * m.rstd; });
    with_parameter<T, V, N>(row_of(op.weight, norm, width), width, [&](int k, const float (&weight)[V]) {
#pragma unroll
        for (int i = 0; i < V; ++i) z[k][i] *= weight[i];
    });
    with_parameter<T, V, N>(row_of(op.bias, norm, width), width, [&](int k, const float (&bias)[V]) {
#pragma unroll
        for (int i = 0; i < V; ++i) z[k][i] += bias[i];
    });
    drop<V, N>(op.dropout, kept, z);
    store_row<T, V, N>(op.y, row * op.sum.width, width, z);
}

// How many terms are asked for at once: what the registers hold beside a row.
constexpr int between(int least, int value, int most) { return value < least ? least : value < most ? value : most; }
template <int V, int N, int Most>
constexpr int terms_at_once = between(1, (V > 1 ? 6 : 8) / N, Most);

template <typename T, int V, int N>
__device__ __forceinline__ void forward_row(const EmbedLayerNormForward& op, const Terms& terms,
                                            const DropoutDraw& draw, int64_t row, RowTeam& team) {
    const int width = static_cast<int>(op.sum.width);
    const int64_t norm = checked_norm(op.norms, row);
    Moments m{0.0f, 0.0f};
    if (norm >= 0) {
        float z[N][V];
        uint32_t kept = 0;
        sum_terms<T, V, N, terms_at_once<V, N, most_terms_at_once>>(terms, row, width, z, [&] {
            if (op.dropout.threshold) kept = draw.kept_columns<V, N>(row, width);
        });
        m = moments<V, N>(z, true, width, op.eps, team);
        write_norm<T, V, N>(op, m, row, norm, kept, z);
    } else {
        store_zeros<T, V, N>(op.y, row * op.sum.width, width);
    }
    if (threadIdx.x == 0) {
        op.mean[row] = m.mean;
        op.rstd[row] = m.rstd;
    }
}

template <typename T, int V, int N>
__global__ void __launch_bounds__(forward_threads(V * N), 1)
    embed_layer_norm_forward_kernel(const __grid_constant__ WithTerms<EmbedLayerNormForward> given) {
    const EmbedLayerNormForward& op = given.op;
    RowTeam team;
    const DropoutDraw draw(op.dropout);
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < op.sum.rows; row += step)
        forward_row<T, V, N>(op, given.terms, draw, row, team);
}

template <typename T, int V>
__device__ __forceinline__ void weigh(const Parameter& weight, int column, int width, float (&g)[V]) {
    if (!weight.data || column >= width) return;
    float values[V];
    load_parameter<T, V>(weight, column, values);
#pragma unroll
    for (int i = 0; i < V; ++i) g[i] *= values[i];
}

// One row of dz; adds the row's share to the sums. The gradient of xhat is formed twice, for its means and for dz,
// which takes fewer registers than to keep it.
template <typename T, int V, int N>
__device__ __forceinline__ void backward_row(const EmbedLayerNormBackward& op, const Terms& terms,
                                             const Parameter& weight, const DropoutDraw& draw, int64_t row,
                                             RowTeam& team, float (&sums)[2][N][V]) {
    const int width = static_cast<int>(op.sum.width);
    const int64_t start = row * op.sum.width;
    HeldRow<T, V, N> dy;
    dy.load(op.dy, start, width);
    const Moments m{op.mean[row], op.rstd[row]};
    const float scale = keep_scale(op.dropout);
    float xhat[N][V];
    uint32_t kept = ~0u;
    sum_terms<T, V, N, terms_at_once<V, N, 2>>(terms, row, width, xhat, [&] {
        if (op.dropout.threshold) kept = draw.kept_columns<V, N>(row, width);
    });
    for_held<V, N>([&](int k, int i) { xhat[k][i] = (xhat[k][i] - m.mean) * m.rstd; });
    const auto upstream = [&](int k, float (&g)[V]) {
        widen<T, V>(dy.at[k], g);
#pragma unroll
        for (int i = 0; i < V; ++i) g[i] = kept >> (k * V + i) & 1 ? g[i] * scale : 0.0f;
    };
    float means[2] = {0.0f, 0.0f};  // of g and of g * xhat
    for_groups<V, N>([&](int k, int column) {
        float g[V];
        upstream(k, g);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            sums[0][k][i] += g[i] * xhat[k][i];
            sums[1][k][i] += g[i];
        }
        weigh<T, V>(weight, column, width, g);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            means[0] += g[i];
            means[1] += g[i] * xhat[k][i];
        }
    });
    team.sum(means);
    means[0] /= static_cast<float>(width);
    means[1] /= static_cast<float>(width);
    T* dz = static_cast<T*>(op.dz) + start;
    for_groups<V, N>([&](int k, int column) {
        float g[V];
        upstream(k, g);
        weigh<T, V>(weight, column, width, g);
#pragma unroll
        for (int i = 0; i < V; ++i) g[i] = (g[i] - means[0] - xhat[k][i] * means[1]) * m.rstd;
        if (column < width) store_vector(dz + column, narrow<T, V>(g));
    });
}

// A block goes through its rows once for every norm, so that the sums are of one norm at a time.
template <typename T, int V, int N>
__global__ void __launch_bounds__(backward_threads(V, N), 1)
    embed_layer_norm_backward_kernel(const __grid_constant__ WithTerms<EmbedLayerNormBackward> given) {
    const EmbedLayerNormBackward& op = given.op;
    const int width = static_cast<int>(op.sum.width);
    const int64_t stride = op.norms.count * op.sum.width;
    float* partial = op.partials + static_cast<int64_t>(blockIdx.x) * 2 * stride;
    RowTeam team;
    const DropoutDraw draw(op.dropout);
    if (op.norms.ids.data)
        for_rows_of(op.norms, -1, op.sum.rows,
                    [&](int64_t row) { store_zeros<T, V, N>(op.dz, row * op.sum.width, width); });
    for (int64_t norm = 0; norm < op.norms.count; ++norm) {
        float sums[2][N][V] = {};  // of dweight and dbias
        const Parameter weight = row_of(op.weight, norm, op.sum.width);
        for_rows_of(op.norms, norm, op.sum.rows, [&](int64_t row) {
            backward_row<T, V, N>(op, given.terms, weight, draw, row, team, sums);
        });
        write_block_sum<V, N>(sums[0], width, partial + norm * width);
        write_block_sum<V, N>(sums[1], width, partial + stride + norm * width);
    }
}

inline dim3 grid_of(const RowPlan& plan) { return dim3(static_cast<unsigned>(plan.blocks)); }
inline dim3 block_of(const RowPlan& plan) { return dim3(plan.threads, plan.rows_per_block); }

// launch(kernel, grid, block, shared bytes, op): nvcc's launch, or the emulator's.
template <typename Launch>
void launch_embed_layer_norm_forward(const EmbedLayerNormForward& op, const Launch& launch) {
    const RowPlan plan = plan_embed_forward(op);
    const WithTerms<EmbedLayerNormForward> given{op, terms_of(op.sum)};
    if (plan.blocks > 0 && plan.vectors > 0)
        visit_shape(op.sum.dtype, plan, [&](auto shape) {
            using S = decltype(shape);
            launch(embed_layer_norm_forward_kernel<typename S::Element, S::columns, S::vectors>, grid_of(plan),
                   block_of(plan), plan.shared_bytes, given);
        });
    else if (plan.blocks > 0)
        visit_element(op.sum.dtype, [&](auto element) {
            launch(embed_layer_norm_forward_wide_kernel<decltype(element)>, grid_of(plan), block_of(plan),
                   plan.shared_bytes, given);
        });
}

// The gradients of weight and bias come from op.partials by a launch of their own.
template <typename Launch>
void launch_embed_layer_norm_backward(const EmbedLayerNormBackward& op, const PartialRows<2>& sums,
                                      const Launch& launch) {
    const RowPlan plan = plan_embed_backward(op);
    const WithTerms<EmbedLayerNormBackward> given{op, terms_of(op.sum)};
    if (plan.blocks > 0 && plan.vectors > 0)
        visit_shape(op.sum.dtype, plan, [&](auto shape) {
            using S = decltype(shape);
            launch(embed_layer_norm_backward_kernel<typename S::Element, S::columns, S::vectors>, grid_of(plan),
                   block_of(plan), plan.shared_bytes, given);
        });
    else if (plan.blocks > 0)
        visit_columns(op.sum.dtype, plan, [&](auto shape) {
            using S = decltype(shape);
            launch(embed_layer_norm_backward_wide_kernel<typename S::Element, S::columns>, grid_of(plan),
                   block_of(plan), plan.shared_bytes, given);
        });
    launch_partial_rows(sums, launch);
}

}  // namespace vlk
