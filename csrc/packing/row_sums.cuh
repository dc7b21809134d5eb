// The kernels of packing that add rows up, in float and in a fixed order, and their gradients. No atomics.
#pragma once
#include "packing/packing_plan.h"
#include "primitives/device_vector.cuh"
#include "primitives/row_copy.cuh"

namespace vlk {

__device__ __forceinline__ int64_t position_at(const Positions& positions, int64_t k) {
    return positions.is_wide ? static_cast<const int64_t*>(positions.data)[k] : static_cast<const int32_t*>(positions.data)[k];
}

template <typename T, int V>
__device__ __forceinline__ void add_vector(const T* from, float (&sum)[V]) {
    float values[V];
    widen<T, V>(load_unit(reinterpret_cast<const Vector<T, V>*>(from)), values);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += values[i];
}

// Row `to` becomes the sum of the rows order[begin] .. order[end - 1] of grad.
template <typename T, int V>
__device__ __forceinline__ void sum_rows(const TakeRowsBackward& op, int64_t begin, int64_t end, T* to) {
    const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x * V;
    const T* grad = static_cast<const T*>(op.grad);
    for (int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V; column < op.width; column += step) {
        float sum[V] = {};
#pragma unroll 4
        for (int64_t k = begin; k < end; ++k) add_vector<T, V>(grad + op.order[k] * op.width + column, sum);
        store_vector(to + column, narrow<T, V>(sum));
    }
}

// Most rows were taken once or not at all: they are copied, or zeros.
template <typename T, int V>
__global__ void __launch_bounds__(copy_threads) take_rows_backward_kernel(const __grid_constant__ Divided<TakeRowsBackward> divided) {
    const TakeRowsBackward& op = divided.op;
    const Positions& sorted = op.sorted;
    const auto at = [&](int64_t k) { return position_at(sorted, k); };
    const auto is_row = [&](int64_t k, int64_t row) { return k < sorted.count && at(k) == row; };
    for_rows(op.rows, divided.rows_per_block, [&](int64_t row) {
        T* const to = static_cast<T*>(op.out) + row * op.width;
        const int64_t begin = last_at_most(sorted.count, row - 1, at) + 1;
        if (is_row(begin + 1, row)) {
            sum_rows<T, V>(op, begin, last_at_most(sorted.count, row, at) + 1, to);
        } else {
            const T* from = is_row(begin, row) ? static_cast<const T*>(op.grad) + op.order[begin] * op.width : nullptr;
            copy_row<Vector<T, V>>(reinterpret_cast<const char*>(from), reinterpret_cast<char*>(to), divided.units);
        }
    });
}

// A warp adds every mean_warps-th row of a sample; then a thread adds, for one column, what the warps have.
template <typename T, int V>
__global__ void __launch_bounds__(copy_threads) mean_segment_kernel(const __grid_constant__ Divided<MeanSegment> divided) {
    VLK_SHARED(float, of_warps, [mean_warps][most_row_threads * V]);
    const MeanSegment& op = divided.op;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * op.segments.per_sample + op.segment;
    const int64_t start = op.segments.starts[i], length = op.segments.lengths[i];
    const bool is_inside = start >= 0 && length >= 0 && start + length <= op.rows;
    const int thread = threadIdx.y * most_row_threads + threadIdx.x;
    for (int64_t first = blockIdx.y * int64_t{most_row_threads}; first < divided.units; first += gridDim.y * int64_t{most_row_threads}) {
        const int64_t unit = first + threadIdx.x;
        const T* column = static_cast<const T*>(op.x) + start * op.width + unit * V;
        float sum[V] = {};
        if (is_inside && unit < divided.units) {
#pragma unroll 4
            for (int64_t row = threadIdx.y; row < length; row += mean_warps) add_vector<T, V>(column + row * op.width, sum);
        }
#pragma unroll
        for (int k = 0; k < V; ++k) of_warps[threadIdx.y][threadIdx.x * V + k] = sum[k];
        __syncthreads();
        if (thread < most_row_threads * V && first * V + thread < op.width) {
            float total = 0.0f;
            for (int warp = 0; warp < mean_warps; ++warp) total += of_warps[warp][thread];
            const float mean = length > 0 ? total / static_cast<float>(length) : 0.0f;
            static_cast<T*>(op.mean)[blockIdx.x * op.width + first * V + thread] = from_float<T>(mean);
        }
        __syncthreads();
    }
}

// Rows up to `end` get the gradient at `from` times `share`; zeros where it is null.
template <typename T>
struct SharedGradient {
    const T* from;
    float share;
    int64_t end;
};

template <typename T>
__device__ __forceinline__ SharedGradient<T> gradient_at(const MeanSegmentBackward& op, int64_t row) {
    const Segments& segments = op.segments;
    const auto index = [&](int64_t sample) { return sample * segments.per_sample + op.segment; };
    const int64_t sample = last_at_most(segments.samples, row, [&](int64_t b) { return segments.starts[index(b)]; });
    const int64_t length = sample < 0 ? 0 : segments.lengths[index(sample)];
    const int64_t end = sample < 0 ? 0 : segments.starts[index(sample)] + length;
    if (row >= end) return {nullptr, 0.0f, sample + 1 < segments.samples ? segments.starts[index(sample + 1)] : op.rows};
    return {static_cast<const T*>(op.grad) + sample * op.width, 1.0f / static_cast<float>(length), end};
}

template <typename T, int V>
__global__ void __launch_bounds__(copy_threads)
    mean_segment_backward_kernel(const __grid_constant__ Divided<MeanSegmentBackward> divided) {
    const MeanSegmentBackward& op = divided.op;
    SharedGradient<T> gradient{nullptr, 0.0f, 0};
    for_rows(op.rows, divided.rows_per_block, [&](int64_t row) {
        if (row >= gradient.end) gradient = gradient_at<T>(op, row);
        T* const to = static_cast<T*>(op.out) + row * op.width;
        const auto* from = reinterpret_cast<const Vector<T, V>*>(gradient.from);
        Vector<T, V> held[loads_at_once];
        for_units(
            divided.units, [&](int k, int64_t unit) { held[k] = from ? load_unit(from + unit) : Vector<T, V>{}; },
            [&](int k, int64_t unit) {
                float values[V];
                widen<T, V>(held[k], values);
#pragma unroll
                for (int i = 0; i < V; ++i) values[i] *= gradient.share;
                store_vector(to + unit * V, narrow<T, V>(values));
            });
    });
}

// Calls work(element, columns that a thread moves at once as a constant).
template <typename Work>
void visit_columns_at_once(Dtype dtype, const RowCopyPlan& plan, const Work& work) {
    visit_element(dtype, [&](auto element) {
        constexpr int at_once = access_bytes / sizeof(element);
        if (plan.unit_bytes == access_bytes)
            work(element, std::integral_constant<int, at_once>{});
        else
            work(element, std::integral_constant<int, 1>{});
    });
}

template <typename Launch>
void launch_take_rows_backward(const TakeRowsBackward& op, const Launch& launch) {
    const RowCopyPlan plan = plan_sums(op);
    if (plan.blocks == 0) return;
    visit_columns_at_once(op.dtype, plan, [&](auto element, auto columns) {
        launch(take_rows_backward_kernel<decltype(element), columns.value>, grid_of(plan), dim3(plan.threads, plan.rows_at_once),
               int64_t{0}, Divided<TakeRowsBackward>{op, plan.rows_per_block, plan.units});
    });
}

template <typename Launch>
void launch_mean_segment(const MeanSegment& op, const Launch& launch) {
    const RowCopyPlan plan = plan_mean(op);
    if (plan.blocks == 0) return;
    visit_columns_at_once(op.dtype, plan, [&](auto element, auto columns) {
        launch(mean_segment_kernel<decltype(element), columns.value>, grid_of(plan), dim3(plan.threads, plan.rows_at_once), int64_t{0},
               Divided<MeanSegment>{op, plan.rows_per_block, plan.units});
    });
}

template <typename Launch>
void launch_mean_segment_backward(const MeanSegmentBackward& op, const Launch& launch) {
    const RowCopyPlan plan = plan_shares(op);
    if (plan.blocks == 0) return;
    visit_columns_at_once(op.dtype, plan, [&](auto element, auto columns) {
        launch(mean_segment_backward_kernel<decltype(element), columns.value>, grid_of(plan), dim3(plan.threads, plan.rows_at_once),
               int64_t{0}, Divided<MeanSegmentBackward>{op, plan.rows_per_block, plan.units});
    });
}

}  // namespace vlk
