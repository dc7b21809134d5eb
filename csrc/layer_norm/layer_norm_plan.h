// How the CUDA kernels divide a LayerNorm or an RMSNorm: a pure function of the shape, the dtype and the alignment, which the
// launcher and the emulator both follow. MATH.md of the op says why these numbers.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <utility>

#include "layer_norm/layer_norm.h"

namespace vlk {

struct RowPlan {
    int columns;         // neighbours that a thread moves at once: 16 bytes of them, or one
    int vectors;         // such groups that a thread holds of a row; 0: it holds none, and loops
    int threads;         // that share a row
    int rows_per_block;  // at a time
    int64_t blocks;
    int64_t shared_bytes;
};

constexpr int64_t widest_row = 16384;
constexpr int64_t widest_row_held = 4096;  // by single columns, and by the backward beside its three sums
// The most columns that a thread holds. Without vectors every column has its own access, so that more threads
// with fewer columns share a row.
constexpr int most_threads = 512;
constexpr int most_columns_held(int columns) { return columns > 1 ? 32 : 8; }

// What bounds the registers of the forward: 512 threads have 128 each. Below 32 columns 640 threads, five blocks
// of 128, have 96.
constexpr int forward_threads(int columns_held) { return columns_held == 32 ? most_threads : 640; }

// The numbers of vectors that kernels are compiled for, by the columns of one.
template <int Columns>
struct VectorCounts;
template <>
struct VectorCounts<1> : std::integer_sequence<int, 2, 8> {};
template <>
struct VectorCounts<4> : std::integer_sequence<int, 1, 2, 4, 6, 8> {};
template <>
struct VectorCounts<8> : std::integer_sequence<int, 1, 2, 3, 4> {};

// Calls work(count as a constant) for the least of the counts that is enough.
template <int... Counts, typename Work>
void visit_count(int needed, std::integer_sequence<int, Counts...>, const Work& work) {
    (void)((needed <= Counts && (work(std::integral_constant<int, Counts>{}), true)) || ...);
}

inline int compiled_count(int columns, int needed) {
    int count = 0;
    const auto keep = [&](auto enough) { count = enough; };
    if (columns == 1) visit_count(needed, VectorCounts<1>{}, keep);
    if (columns == 4) visit_count(needed, VectorCounts<4>{}, keep);
    if (columns == 8) visit_count(needed, VectorCounts<8>{}, keep);
    return count;
}

inline bool is_aligned(std::initializer_list<const void*> pointers) {
    uintptr_t bits = 0;
    for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
    return bits % 16 == 0;
}

inline int columns_at_once(Dtype dtype, int64_t width, bool aligned) {
    const int element_bytes = dtype == Dtype::float32 ? 4 : 2;
    return aligned && width % 8 == 0 ? 16 / element_bytes : 1;
}

// The fewest threads, whole warps, that hold a row.
inline RowPlan held_row(int64_t width, int columns) {
    const int64_t vectors = (width + columns - 1) / columns;
    int threads = 32;
    while (vectors > threads * int64_t{most_columns_held(columns) / columns}) threads *= 2;
    const int needed = static_cast<int>((vectors + threads - 1) / threads);
    return {columns, compiled_count(columns, needed), threads, 1, 0, 0};
}

inline int64_t blocks_for(int64_t rows, int rows_per_block, int64_t most) {
    const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
    return blocks < most ? blocks : most;
}

inline RowPlan plan_forward(const LayerNormForward& op) {
    constexpr int64_t most_blocks = 1 << 20;
    const bool aligned = is_aligned({op.x, op.residual, op.linear_bias.data, op.weight.data, op.bias.data, op.y, op.z});
    const int columns = columns_at_once(op.dtype, op.width, aligned);
    if (columns == 1 && op.width > widest_row_held)
        return {columns, 0, most_threads, 1, blocks_for(op.rows, 1, most_blocks),
                op.width * static_cast<int64_t>(sizeof(float))};
    RowPlan plan = held_row(op.width, columns);
    plan.rows_per_block = plan.threads == 32 ? 4 : 1;
    plan.blocks = blocks_for(op.rows, plan.rows_per_block, most_blocks);
    return plan;
}

// Rows of one warp each that a block of the backward takes at a time: the less a thread holds, the more of them.
constexpr int backward_rows(int columns_held) { return columns_held <= 8 ? 8 : 4; }
constexpr int backward_threads(int columns, int vectors) {
    return columns == 1 ? most_threads : 32 * backward_rows(columns * vectors);
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
