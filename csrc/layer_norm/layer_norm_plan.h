// How the CUDA kernels divide a LayerNorm or an RMSNorm: a pure function of the shape, the dtype and the alignment,
// which the launcher and the emulator both follow. MATH.md of the op says why these numbers.
#pragma once
#include "layer_norm/layer_norm.h"
#include "primitives/row_plan.h"

namespace vlk {

constexpr int64_t widest_row_held = 4096;  // by the backward, beside its three sums

inline RowPlan plan_forward(const LayerNormForward& op) {
    constexpr int64_t most_blocks = 1 << 20;
    const bool aligned = is_aligned({op.x, op.residual, op.linear_bias.data, op.weight.data, op.bias.data, op.y, op.z});
    RowPlan plan = held_row(op.width, columns_at_once(op.dtype, op.width, aligned));
    if (plan.vectors == 0) plan.shared_bytes = op.width * static_cast<int64_t>(sizeof(float));
    plan.rows_per_block = plan.threads == 32 ? 4 : 1;
    plan.blocks = blocks_for(op.rows, plan.rows_per_block, most_blocks);
    return plan;
}

// Every block makes one partial row of each sum. There are at most two blocks for each multiprocessor of a Hopper
// card, and as many on any other card: the sums are the same bits everywhere.
inline RowPlan plan_backward(const LayerNormBackward& op) {
    constexpr int64_t most_blocks = 264;
    const bool aligned = is_aligned({op.dy, op.dsum, op.z, op.weight.data, op.dz, op.dx});
    const int columns = columns_at_once(op.dtype, op.width, aligned);
    if (op.width > widest_row_held)
        return {columns, 0, most_threads, 1, blocks_for(op.rows, 1, most_blocks / 2),
                2 * op.width * static_cast<int64_t>(sizeof(float))};
    RowPlan plan = held_row(op.width, columns);
    plan.rows_per_block = plan.threads == 32 ? backward_rows(plan.vectors * columns) : 1;
    plan.blocks = blocks_for(op.rows, plan.rows_per_block, most_blocks);
    plan.shared_bytes = plan.rows_per_block * op.width * static_cast<int64_t>(sizeof(float));
    return plan;
}

}  // namespace vlk
