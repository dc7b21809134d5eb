// How CUDA kernels that hold a row in registers divide rows among threads: pure functions of the shape, the dtype and
// the alignment, which launchers and the emulator both follow.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <utility>

#include "primitives/dtype.h"

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
// The most columns that a thread holds. Without vectors every column has its own access, so that more threads
// with fewer columns share a row; the 512 of a block do not hold more than 4,096.
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

// The fewest threads, whole warps, that hold a row; a whole block where they do not.
inline RowPlan held_row(int64_t width, int columns) {
    const int64_t vectors = (width + columns - 1) / columns, most = most_columns_held(columns) / columns;
    if (vectors > most_threads * most) return {columns, 0, most_threads, 1, 0, 0};
    int threads = 32;
    while (vectors > threads * most) threads *= 2;
    const int needed = static_cast<int>((vectors + threads - 1) / threads);
    return {columns, compiled_count(columns, needed), threads, 1, 0, 0};
}

// Rows of one warp each that a block of the backward takes at a time: the less a thread holds, the more of them.
constexpr int backward_rows(int columns_held) { return columns_held <= 8 ? 8 : 4; }
constexpr int backward_threads(int columns, int vectors) {
    return columns == 1 ? most_threads : 32 * backward_rows(columns * vectors);
}

inline int64_t blocks_for(int64_t rows, int rows_per_block, int64_t most) {
    const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
    return blocks < most ? blocks : most;
}

}  // namespace vlk
