// The CUDA kernels of packing. Every row of a result is written exactly once, by a team of threads that finds out itself where the
// row comes from. Compiled by nvcc from packing.cu and by the emulator.
#pragma once
#include "packing/packing_plan.h"
#include "packing/row_sums.cuh"
#include "primitives/row_copy.cuh"

namespace vlk {

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of one tensor: `count` of them from `row` on; a row of -1 stands for zeros.
struct RowRange {
    int64_t row, count;
};

// The part of `wanted` that lies in a tensor of so many rows; zeros where its first row lies outside.
__device__ __forceinline__ RowRange within(RowRange wanted, int64_t rows) {
    if (wanted.row < 0 || wanted.row >= rows) return {-1, wanted.count};
    return {wanted.row, smaller(wanted.count, rows - wanted.row)};
}

__device__ __forceinline__ const char* address_of(const char* data, RowRange range, int64_t row_bytes) {
    return range.row < 0 ? nullptr : data + range.row * row_bytes;
}

__device__ __forceinline__ RowRun run_at(const JoinSegments& op, int64_t row) {
    const Segments& segments = op.segments;
    const Parts& parts = op.parts;
    char* const to = op.packed + row * op.row_bytes;
    const int64_t count = static_cast<int64_t>(segments.samples) * segments.per_sample;
    const int64_t i = last_at_most(count, row, [&](int64_t k) { return segments.starts[k]; });
    const int64_t start = i < 0 ? 0 : segments.starts[i], end = i < 0 ? 0 : start + segments.lengths[i];
    if (row >= end) return {nullptr, to, row, i + 1 < count ? segments.starts[i + 1] : op.packed_rows};
    const int64_t sample = i / segments.per_sample;
    const int part = parts.part_of[i - sample * segments.per_sample];
    if (part < 0) return {nullptr, to, row, end};
    // A padded part is seen as its sample's rows, so that a longer segment does not read into the next sample.
    const char* data = parts.data[part];
    if (!parts.starts) data += sample * parts.rows[part] * op.row_bytes;
    const int64_t first = parts.starts ? parts.starts[i] : 0;
    const RowRange from = within({first + row - start, end - row}, parts.rows[part]);
    return {address_of(data, from, op.row_bytes), to, row, row + from.count};
}

// Which packed rows the rows of a padded part come from: of its only segment.
__device__ __forceinline__ RowRange padded_range(const SplitSegments& op, int part, int64_t row) {
    const int64_t rows = op.parts.rows[part], sample = row / rows, position = row - sample * rows;
    int segment = 0;
    while (op.parts.part_of[segment] != part) ++segment;
    const int64_t i = sample * op.segments.per_sample + segment;
    const int64_t length = smaller(op.segments.lengths[i], rows);
    if (position >= length) return {-1, rows - position};
    return within({op.segments.starts[i] + position, length - position}, op.packed_rows);
}

// The same for a packed part, in which the segments of a sample may stand in any order: first the sample, then the segment.
__device__ __forceinline__ RowRange packed_range(const SplitSegments& op, int part, int64_t row) {
    const Segments& segments = op.segments;
    const int64_t nobody = op.parts.rows[part];
    const auto start_of = [&](int64_t sample, int segment) -> int64_t {
        return op.parts.part_of[segment] == part ? op.parts.starts[sample * segments.per_sample + segment] : nobody;
    };
    const auto first_row = [&](int64_t sample) {
        int64_t first = nobody;
        for (int s = 0; s < segments.per_sample; ++s) first = smaller(first, start_of(sample, s));
        return first;
    };
    const int64_t sample = last_at_most(segments.samples, row, first_row);
    int64_t next = sample + 1 < segments.samples ? first_row(sample + 1) : nobody;
    for (int s = 0; s < segments.per_sample && sample >= 0; ++s) {
        const int64_t start = start_of(sample, s), i = sample * segments.per_sample + s;
        const int64_t left = start + segments.lengths[i] - row;
        if (start <= row && left > 0) return within({segments.starts[i] + row - start, left}, op.packed_rows);
        if (start > row) next = smaller(next, start);
    }
    return {-1, next - row};
}

__device__ __forceinline__ RowRun run_at(const SplitSegments& op, int64_t row) {
    const Parts& parts = op.parts;
    int part = 0;
    int64_t at = row;
    for (;; ++part) {
        const int64_t rows = parts.starts ? parts.rows[part] : parts.rows[part] * op.segments.samples;
        if (at < rows) break;
        at -= rows;
    }
    const RowRange from = parts.starts ? packed_range(op, part, at) : padded_range(op, part, at);
    return {address_of(op.packed, from, op.row_bytes), parts.data[part] + at * op.row_bytes, row, row + from.count};
}

__device__ __forceinline__ RowRun run_at(const TakeRows& op, int64_t row) {
    const int64_t position = row < op.positions.count ? position_at(op.positions, row) : -1;
    const RowRange from = within({position, 1}, op.x_rows);
    return {address_of(op.x, from, op.row_bytes), op.out + row * op.row_bytes, row, row + 1};
}

template <typename Launch>
void launch_join_segments(const JoinSegments& op, const Launch& launch) {
    launch_row_copy(op, op.packed_rows, plan_copy(op), launch);
}

template <typename Launch>
void launch_split_segments(const SplitSegments& op, const Launch& launch) {
    launch_row_copy(op, rows_of_parts(op), plan_copy(op), launch);
}

template <typename Launch>
void launch_take_rows(const TakeRows& op, const Launch& launch) {
    launch_row_copy(op, op.rows, plan_copy(op), launch);
}

}  // namespace vlk
