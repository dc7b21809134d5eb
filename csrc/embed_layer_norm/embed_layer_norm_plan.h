// How the CUDA kernels divide the rows of an embedding sum: a pure function of the shape, the dtype and the
// alignment, which the launcher and the emulator both follow. MATH.md of the op says why these numbers.
#pragma once
#include "embed_layer_norm/embed_layer_norm.h"
#include "primitives/row_plan.h"

namespace vlk {

constexpr int64_t widest_row_summed = 4096;  // whose two sums of the backward lie in registers beside it

inline bool is_aligned(const EmbeddingSum& sum) {
    bool aligned = is_aligned({sum.dense});
    for (int64_t table = 0; table < sum.num_tables; ++table) aligned = aligned && is_aligned({sum.tables[table]});
    return aligned;
}

inline RowPlan plan_embed_forward(const EmbedLayerNormForward& op) {
    constexpr int64_t most_blocks = 1 << 20;
    const bool aligned = is_aligned(op.sum) && is_aligned({op.weight.data, op.bias.data, op.y});
    RowPlan plan = held_row(op.sum.width, columns_at_once(op.sum.dtype, op.sum.width, aligned));
    if (plan.vectors == 0) plan.shared_bytes = op.sum.width * static_cast<int64_t>(sizeof(float));
    plan.rows_per_block = plan.threads == 32 ? 4 : 1;
    plan.blocks = blocks_for(op.sum.rows, plan.rows_per_block, most_blocks);
    return plan;
}

// A block makes a partial row of each sum for every norm. For a few norms there are two blocks for each
// multiprocessor of a Hopper card; for many, fewer, so that partial rows do not outgrow the data.
inline int64_t most_summing_blocks(int64_t norms) {
    constexpr int64_t most = 264, fewest = 33, partial_rows = 4 * most;
    const int64_t blocks = norms > 0 ? partial_rows / norms : most;
    return blocks > most ? most : blocks < fewest ? fewest : blocks;
}

inline RowPlan plan_embed_backward(const EmbedLayerNormBackward& op) {
    constexpr int64_t float_bytes = sizeof(float);
    const bool aligned = is_aligned(op.sum) && is_aligned({op.dy, op.weight.data, op.dz});
    const int columns = columns_at_once(op.sum.dtype, op.sum.width, aligned);
    const int64_t most_blocks = most_summing_blocks(op.norms.count);
    if (op.sum.width > widest_row_summed)
        return {columns, 0, most_threads, 1, blocks_for(op.sum.rows, 1, most_blocks / 2), 2 * op.sum.width * float_bytes};
    RowPlan plan = held_row(op.sum.width, columns);
    plan.rows_per_block = plan.threads == 32 ? backward_rows(plan.vectors * columns) : 1;
    plan.blocks = blocks_for(op.sum.rows, plan.rows_per_block, most_blocks);
    plan.shared_bytes = plan.rows_per_block * op.sum.width * float_bytes;
    return plan;
}

}  // namespace vlk
