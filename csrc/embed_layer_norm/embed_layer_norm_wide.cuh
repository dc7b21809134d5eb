// The backward for rows too wide to lie in registers beside two sums. A block takes a row at a time and builds it
// twice, the second time from a cache. The sums of dweight and dbias lie in shared memory: every column belongs to one
// thread, which alone touches its sums.
#pragma once
#include "embed_layer_norm/row_norms.cuh"
#include "embed_layer_norm/row_terms.cuh"
#include "primitives/device_dropout.cuh"
#include "primitives/moments.cuh"

namespace vlk {

// What a thread knows of its row and of all rows of one norm.
struct WideRow {
    const EmbedLayerNormBackward& op;
    const Terms& terms;
    const Parameter& weight;
    const DropoutDraw& draw;
    int64_t row;
    Moments m;
};

// The gradient of y before the weight, with it, and xhat of one group of columns.
template <typename T, int V>
struct WideGroup {
    float dn[V], g[V], xhat[V];

    __device__ __forceinline__ WideGroup(const WideRow& of, int column) {
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

// work(column) for every group of V columns of this thread.
template <int V, typename Work>
__device__ __forceinline__ void for_own_groups(int width, const Work& work) {
#pragma unroll 1
    for (int column = threadIdx.x * V; column < width; column += blockDim.x * V) work(column);
}

// One row of dz; adds the row's share to the sums of dweight and, `width` behind them, dbias.
template <typename T, int V>
__device__ __forceinline__ void wide_backward_row(const WideRow& of, RowTeam& team, float* sums) {
    const int width = static_cast<int>(of.op.sum.width);
    float means[2] = {0.0f, 0.0f};  // of g and of g * xhat
    for_own_groups<V>(width, [&](int column) {
        const WideGroup<T, V> group(of, column);
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
        WideGroup<T, V> group(of, column);
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
        for_rows_of(op.norms, -1, op.sum.rows, [&](int64_t row) {
            T* dz = static_cast<T*>(op.dz) + row * op.sum.width;
            for_own_groups<V>(width, [&](int column) { store_vector(dz + column, Vector<T, V>{}); });
        });
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
