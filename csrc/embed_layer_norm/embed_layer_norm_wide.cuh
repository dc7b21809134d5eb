// Rows too wide to lie in registers, alone or beside two sums: a block takes one at a time. The forward of single
// columns keeps z in shared memory. The backward builds a row twice, the second time from a cache; its sums of dweight
// and dbias lie in shared memory: every column belongs to one thread, which alone touches its sums.
#pragma once
#include "embed_layer_norm/row_norms.cuh"
#include "embed_layer_norm/row_terms.cuh"
#include "primitives/device_dropout.cuh"
#include "primitives/moments.cuh"

namespace vlk {

// work(column) for every group of V columns of this thread.
template <int V, typename Work>
__device__ __forceinline__ void for_own_groups(int width, const Work& work) {
#pragma unroll 1
    for (int column = threadIdx.x * V; column < width; column += blockDim.x * V) work(column);
}

template <typename T, int V>
__device__ __forceinline__ void store_wide_zeros(void* data, int64_t row, int width) {
    T* to = static_cast<T*>(data) + row * width;
    for_own_groups<V>(width, [&](int column) { store_vector(to + column, Vector<T, V>{}); });
}

// y of one column.
__device__ __forceinline__ float wide_norm(const EmbedLayerNormForward& op, const DropoutDraw& draw, Moments m,
                                           int64_t row, int column, float z, float weight, float bias) {
    const float y = (z - m.mean) * m.rstd * weight + bias;
    if (!op.dropout.threshold) return y;
    return draw.kept_group<1>(row, column) ? y * keep_scale(op.dropout) : 0.0f;
}

template <typename T>
__device__ __forceinline__ Moments write_wide_row(const EmbedLayerNormForward& op, const Terms& terms,
                                                  const DropoutDraw& draw, int64_t row, int64_t norm, RowTeam& team,
                                                  float* z) {
    const int width = static_cast<int>(op.sum.width);
    const Parameter weight = row_of(op.weight, norm, width), bias = row_of(op.bias, norm, width);
    float sum[1] = {0.0f}, squares[1] = {0.0f};
    for_own_groups<1>(width, [&](int column) {
        float value[1];
        sum_terms_of_group<T, 1>(terms, row, width, column, value);
        sum[0] += z[column] = value[0];
    });
    team.sum(sum);
    const float mean = sum[0] / static_cast<float>(width);
    for_own_groups<1>(width, [&](int column) { squares[0] += (z[column] - mean) * (z[column] - mean); });
    team.sum(squares);
    const Moments m{mean, rstd_of(squares[0], width, op.eps)};
    for_own_groups<1>(width, [&](int column) {
        float scale[1] = {1.0f}, offset[1] = {0.0f};
        if (weight.data) load_parameter<T, 1>(weight, column, scale);
        if (bias.data) load_parameter<T, 1>(bias, column, offset);
        const float y = wide_norm(op, draw, m, row, column, z[column], scale[0], offset[0]);
        static_cast<T*>(op.y)[row * op.sum.width + column] = from_float<T>(y);
    });
    return m;
}

template <typename T>
__global__ void __launch_bounds__(most_threads)
    embed_layer_norm_forward_wide_kernel(const __grid_constant__ WithTerms<EmbedLayerNormForward> given) {
    VLK_DYNAMIC_SHARED(z);
    const EmbedLayerNormForward& op = given.op;
    RowTeam team;
    const DropoutDraw draw(op.dropout);
    for (int64_t row = blockIdx.x; row < op.sum.rows; row += gridDim.x) {
        const int64_t norm = checked_norm(op.norms, row);
        Moments m{0.0f, 0.0f};
        if (norm >= 0)
            m = write_wide_row<T>(op, given.terms, draw, row, norm, team, z);
        else
            store_wide_zeros<T, 1>(op.y, row, static_cast<int>(op.sum.width));
        if (threadIdx.x == 0) {
            op.mean[row] = m.mean;
            op.rstd[row] = m.rstd;
        }
    }
}

// What a thread knows of its row and of all rows of one norm.
struct EmbeddedRow {
    const EmbedLayerNormBackward& op;
    const Terms& terms;
    const Parameter& weight;
    const DropoutDraw& draw;
    int64_t row;
    Moments m;
};

// The gradient of y before the weight, with it, and xhat of one group of columns.
template <typename T, int V>
struct EmbeddedGroup {
    float dn[V], g[V], xhat[V];

    __device__ __forceinline__ EmbeddedGroup(const EmbeddedRow& of, int column) {
        const int64_t at = of.row * of.op.sum.width + column;
        const uint32_t kept = of.op.dropout.threshold ? of.draw.template kept_group<V>(of.row, column) : ~0u;
        const float scale = keep_scale(of.op.dropout);
        float weight[V];
        sum_terms_of_group<T, V>(of.terms, of.row, of.op.sum.width, column, xhat);
        load_floats<T, V>(static_cast<const T*>(of.op.dy) + at, dn);
        if (of.weight.data) load_parameter<T, V>(of.weight, column, weight);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            xhat[i] = (xhat[i] - of.m.mean) * of.m.rstd;
            dn[i] = kept >> i & 1 ? dn[i] * scale : 0.0f;
            g[i] = of.weight.data ? dn[i] * weight[i] : dn[i];
        }
    }
};

// One row of dz; adds the row's share to the sums of dweight and, `width` behind them, dbias.
template <typename T, int V>
__device__ __forceinline__ void wide_backward_row(const EmbeddedRow& of, RowTeam& team, float* sums) {
    const int width = static_cast<int>(of.op.sum.width);
    float means[2] = {0.0f, 0.0f};  // of g and of g * xhat
    for_own_groups<V>(width, [&](int column) {
        const EmbeddedGroup<T, V> group(of, column);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            sums[column + i] += group.dn[i] * group.xhat[i];
            sums[width + column + i] += group.dn[i];
            means[0] += group.g[i];
            means[1] += group.g[i] * group.xhat[i];
        }
    });
    team.sum(means);
    means[0] /= static_cast<float>(width);
    means[1] /= static_cast<float>(width);
    T* dz = static_cast<T*>(of.op.dz) + of.row * of.op.sum.width;
    for_own_groups<V>(width, [&](int column) {
        EmbeddedGroup<T, V> group(of, column);
#pragma unroll
        for (int i = 0; i < V; ++i) group.g[i] = (group.g[i] - means[0] - group.xhat[i] * means[1]) * of.m.rstd;
        store_vector(dz + column, narrow<T, V>(group.g));
    });
}

// Zeros, or what the rows of a norm have summed, from shared memory to the block's partial row.
template <int V>
__device__ __forceinline__ void clear_wide_sums(int width, float* sums) {
    for_own_groups<V>(width, [&](int column) {
        for (int i = column; i < column + V; ++i) sums[i] = sums[width + i] = 0.0f;
    });
}

template <int V>
__device__ __forceinline__ void write_wide_sums(int width, const float* sums, float* partial, int64_t stride) {
    for_own_groups<V>(width, [&](int column) {
        for (int i = column; i < column + V; ++i) {
            partial[i] = sums[i];
            partial[stride + i] = sums[width + i];
        }
    });
}

template <typename T, int V>
__global__ void __launch_bounds__(most_threads)
    embed_layer_norm_backward_wide_kernel(const __grid_constant__ WithTerms<EmbedLayerNormBackward> given) {
    VLK_DYNAMIC_SHARED(sums);
    const EmbedLayerNormBackward& op = given.op;
    const int width = static_cast<int>(op.sum.width);
    const int64_t stride = op.norms.count * op.sum.width;
    float* partial = op.partials + static_cast<int64_t>(blockIdx.x) * 2 * stride;
    RowTeam team;
    const DropoutDraw draw(op.dropout);
    if (op.norms.ids.data)
        for_rows_of(op.norms, -1, op.sum.rows, [&](int64_t row) { store_wide_zeros<T, V>(op.dz, row, width); });
    for (int64_t norm = 0; norm < op.norms.count; ++norm) {
        const Parameter weight = row_of(op.weight, norm, op.sum.width);
        clear_wide_sums<V>(width, sums);
        for_rows_of(op.norms, norm, op.sum.rows, [&](int64_t row) {
            wide_backward_row<T, V>({op, given.terms, weight, draw, row, {op.mean[row], op.rstd[row]}}, team, sums);
        });
        write_wide_sums<V>(width, sums, partial + norm * width, stride);
    }
}

}  // namespace vlk
