// How the CUDA kernels divide packing; primitives/row_copy_plan.h divides the copies. MATH.md of the op says why.
#pragma once
#include "packing/packing.h"
#include "primitives/row_copy_plan.h"

namespace vlk {

inline uint64_t address(const void* data) { return reinterpret_cast<uintptr_t>(data); }

// All rows that a split writes.
inline int64_t rows_of_parts(const MovedSegments& op) {
    int64_t rows = 0;
    for (int part = 0; part < op.parts.count; ++part) rows += op.parts.rows[part];
    return op.parts.starts ? rows : rows * op.segments.samples;
}

inline int moved_access(const MovedSegments& op) {
    uint64_t bits = address(op.packed);
    for (int part = 0; part < op.parts.count; ++part) bits |= address(op.parts.data[part]);
    return common_access({bits, static_cast<uint64_t>(op.row_bytes)});
}

inline RowCopyPlan plan_copy(const JoinSegments& op) { return plan_row_copy(op.packed_rows, op.row_bytes, moved_access(op)); }
inline RowCopyPlan plan_copy(const SplitSegments& op) { return plan_row_copy(rows_of_parts(op), op.row_bytes, moved_access(op)); }
inline RowCopyPlan plan_copy(const TakeRows& op) {
    const int unit = common_access({address(op.x), address(op.out), static_cast<uint64_t>(op.row_bytes)});
    return plan_row_copy(op.rows, op.row_bytes, unit);
}

// Rows of elements that are computed with: 16 bytes at once, or single elements.
inline RowCopyPlan plan_elements(Dtype dtype, int64_t rows, int64_t width, const void* from, const void* to) {
    const int element_bytes = dtype == Dtype::float32 ? 4 : 2;
    const int64_t row_bytes = width * element_bytes;
    const bool is_aligned = common_access({address(from), address(to), static_cast<uint64_t>(row_bytes)}) == 16;
    return plan_row_copy(rows, row_bytes, is_aligned ? 16 : element_bytes);
}

inline RowCopyPlan plan_sums(const TakeRowsBackward& op) { return plan_elements(op.dtype, op.rows, op.width, op.grad, op.out); }
inline RowCopyPlan plan_shares(const MeanSegmentBackward& op) { return plan_elements(op.dtype, op.rows, op.width, op.grad, op.out); }

// The mean of a sample: a block takes some columns of it, as many as a warp moves at once, and its warps take turns at the rows.
constexpr int mean_warps = copy_threads / most_row_threads;

inline RowCopyPlan plan_mean(const MeanSegment& op) {
    RowCopyPlan plan = plan_elements(op.dtype, op.segments.samples, op.width, op.x, op.mean);
    const int64_t most_column_blocks = 65535, wanted = quotient_up(plan.units, most_row_threads);
    plan.threads = most_row_threads;
    plan.rows_at_once = mean_warps;
    plan.rows_per_block = 1;
    plan.blocks = plan.units ? op.segments.samples : 0;
    plan.column_blocks = wanted < most_column_blocks ? wanted : most_column_blocks;
    return plan;
}

}  // namespace vlk
