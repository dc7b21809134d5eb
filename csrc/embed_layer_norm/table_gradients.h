// The gradients of all tables of an embedding sum at once, on a device. The rows of the tables are numbered through,
// one table after another; the tokens of every row are brought together by a sort of (row, token).
#pragma once
#include <cstdint>

#include "embed_layer_norm/embed_layer_norm.h"
#include "primitives/device_sort_plan.h"
#include "primitives/row_plan.h"

namespace vlk {

struct TableGradients {
    Dtype dtype;
    int64_t tokens, width, id_stride;
    Ids ids;                           // of token t and table k: ids[t * id_stride + column[k]]; negative: none
    const void* gradient;              // [tokens, width]
    int64_t num_tables;
    int64_t column[most_tables];
    int32_t first_row[most_tables + 1];  // table k has the rows first_row[k] to first_row[k + 1]
    void* table[most_tables];          // [its rows, width], written once
    int32_t* integers;                 // workspace, as many as the plan says
    float* partials;                   // likewise
};

// A row with more tokens than a chunk holds is summed in pieces: what chunks of the sorted tokens hold of it.
struct TablePlan {
    SortPlan sort;
    int columns;                       // that a thread moves at once
    int64_t rows, slabs;               // of all tables; a warp takes a slab of the columns of a row
    int64_t chunk, chunks;             // tokens of one, and how many
    int64_t integers, floats;          // of workspace
};

inline TablePlan plan_table_gradients(const TableGradients& op) {
    constexpr int64_t most_chunks = 512, shortest_chunk = 32, longest_chunk = 512;
    const auto quotient_up = [](int64_t value, int64_t by) { return (value + by - 1) / by; };
    bool aligned = is_aligned({op.gradient});
    for (int64_t k = 0; k < op.num_tables; ++k) aligned = aligned && is_aligned({op.table[k]});
    TablePlan plan{};
    plan.rows = op.first_row[op.num_tables];
    plan.sort = plan_sort(op.tokens * op.num_tables, plan.rows);  // that many is the key of a token without a row
    plan.columns = columns_at_once(op.dtype, op.width, aligned);
    plan.slabs = quotient_up(op.width, 32 * plan.columns);
    const int64_t chunk = quotient_up(plan.sort.count, most_chunks);
    plan.chunk = chunk < shortest_chunk ? shortest_chunk : chunk > longest_chunk ? longest_chunk : chunk;
    plan.chunks = quotient_up(plan.sort.count, plan.chunk);
    plan.integers = 4 * plan.sort.count + sort_counts(plan.sort) + plan.rows + 1;
    plan.floats = 2 * plan.chunks * op.width;
    return plan;
}

}  // namespace vlk
