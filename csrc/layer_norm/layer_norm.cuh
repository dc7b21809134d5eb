// The CUDA kernels of LayerNorm: a row lies in the registers of the threads that share it, and every tensor is
// read and written once. Compiled by nvcc from layer_norm.cu and by the emulator.
#pragma once
#include <type_traits>

#include "layer_norm/layer_norm_plan.h"
#include "primitives/device_dropout.cuh"
#include "primitives/device_vector.cuh"
#include "primitives/row_team.cuh"

namespace vlk {

// A thread's columns of a row as they lie in memory: half types take half the registers until they are used.
// Past the end of the row are zeros, so that only accesses, and the squares of differences, ask where it is.
template <typename T, int V, int N>
struct HeldRow {
    Vector<T, V> at[N];

    __device__ __forceinline__ void load(const void* data, int64_t start, int width) {
        const T* first = static_cast<const T*>(data) + start;
        for_groups<V, N>([&](int k, int column) {
            at[k] = column < width ? load_vector<T, V>(first + column) : Vector<T, V>{};
        });
    }
};

// work(k, values) with the parameter's values at this thread's columns, unless it is absent.
template <typename T, int V, int N, typename Work>
__device__ __forceinline__ void with_parameter(const Parameter& parameter, int width, const Work& work) {
    const auto read = [&](auto element) {
        const auto* data = static_cast<const decltype(element)*>(parameter.data);
        for_groups<V, N>([&](int k, int column) {
            float values[V] = {};
            if (column < width) load_floats<decltype(element), V>(data + column, values);
            work(k, values);
        });
    };
    if (!parameter.data) return;
    if (parameter.dtype == Dtype::float32)
        read(float{});
    else if constexpr (!std::is_same_v<T, float>)
        read(T{});
}

// work(k, i) for every column that this thread holds.
template <int V, int N, typename Work>
__device__ __forceinline__ void for_held(const Work& work) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
#pragma unroll
        for (int i = 0; i < V; ++i) work(k, i);
    }
}

__device__ __forceinline__ float row_factor(const Dropout& dropout, const float* row_scale, int64_t row) {
    return keep_scale(dropout) * (row_scale ? row_scale[row] : 1.0f);
}

// Whether a second row is asked for before the first is waited for. Single columns take a register each, whatever
// their size, and leave none for it.
template <int V>
constexpr bool early = V > 1;

// z from x, rounded as it is stored: y is the LayerNorm of exactly that z.
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

struct Moments {
    float mean, rstd;
};

// Two passes: the squares are of differences from the mean, so a large mean costs no accuracy.
template <int V, int N>
__device__ __forceinline__ Moments moments(const float (&z)[N][V], int width, float eps, RowTeam& team) {
    float sum[1] = {0.0f}, squares[1] = {0.0f};
    for_held<V, N>([&](int k, int i) { sum[0] += z[k][i]; });
    team.sum(sum);
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
    T* y = static_cast<T*>(op.y) + row * op.width;
    for_groups<V, N>([&](int k, int column) {
        if (column < width) store_vector(y + column, narrow<T, V>(z[k]));
    });
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
    const Moments m = moments<V, N>(z, width, op.eps, team);
    if (threadIdx.x == 0) {
        op.mean[row] = m.mean;
        op.rstd[row] = m.rstd;
    }
    write_norm<T, V, N>(op, m, row, z);
}

template <typename T, int V, int N>
__global__ void __launch_bounds__(forward_threads(V * N)) layer_norm_forward_kernel(const LayerNormForward op) {
    RowTeam team;
    const DropoutDraw draw(op.dropout);
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < op.rows; row += step)
        forward_row<T, V, N>(op, draw, row, team);
}

// On the host: calls work(a kernel's element type, columns and vectors, as one type).
template <typename T, int V, int N>
struct Shape {
    using Element = T;
    static constexpr int columns = V, vectors = N;
};

template <typename Work>
void visit_shape(Dtype dtype, const RowPlan& plan, const Work& work) {
    visit_element(dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int at_once = access_bytes / sizeof(T);
        if (plan.columns == 1)
            visit_count(plan.vectors, VectorCounts<1>{}, [&](auto n) { work(Shape<T, 1, n>{}); });
        else
            visit_count(plan.vectors, VectorCounts<at_once>{}, [&](auto n) { work(Shape<T, at_once, n>{}); });
    });
}

// launch(kernel, grid, block, shared bytes, op): nvcc's launch, or the emulator's.
template <typename Launch>
void launch_layer_norm_forward(const LayerNormForward& op, const Launch& launch) {
    const RowPlan plan = plan_forward(op);
    if (plan.blocks == 0) return;
    visit_shape(op.dtype, plan, [&](auto shape) {
        using S = decltype(shape);
        launch(layer_norm_forward_kernel<typename S::Element, S::columns, S::vectors>,
               dim3(static_cast<unsigned>(plan.blocks)), dim3(plan.threads, plan.rows_per_block),
               plan.shared_bytes, op);
    });
}

}  // namespace vlk
