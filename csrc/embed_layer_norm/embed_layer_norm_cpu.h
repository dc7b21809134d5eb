#pragma once
#include "embed_layer_norm/embed_layer_norm.h"
#include "primitives/cpu_isa.h"

namespace vlk {

// The gradient of a table: row v is the sum of the rows of dz whose id is v, in the order of the tokens.
// Threads share the columns before they share the rows, so that a table of two rows, or one of which a few
// rows fill the batch, keeps them all busy. A column is summed alike however the table is cut.
struct TableGradient {
    Dtype dtype;
    int64_t tokens, width, table_rows;
    int64_t part_columns;
    const void* gradient;       // [tokens, width]
    void* table;                // [table_rows, width]
};

struct TokenIds {
    Ids ids;                    // of token t: ids[t * stride + column]; negative: none
    int64_t stride, column;
};

static inline int64_t id_of(TokenIds tokens, int64_t token) {
    return id_at(tokens.ids, token * tokens.stride + tokens.column);
}

// The tokens of table row v are order[first[v] : first[v + 1]]; one entry more can be read.
struct SortedTokens {
    const int32_t* first;       // [table_rows + 1]
    const int32_t* order;
    bool stream;                // rows of gradient and table are whole cache lines
};

}  // namespace vlk

VLK_DECLARE_CPU(
    void embed_layer_norm_forward(const vlk::EmbedLayerNormForward& op, int64_t first_row, int64_t last_row);
    void embed_layer_norm_backward(const vlk::EmbedLayerNormBackward& op, int64_t first_chunk,
                                   int64_t last_chunk);
    // Sums in float of a whole table: for one that fits in the caches.
    void small_table_gradient(const vlk::TableGradient& op, vlk::TokenIds tokens, int64_t first_part,
                              int64_t last_part);
    // Block b is row b % table_rows of part b / table_rows.
    void large_table_gradient(const vlk::TableGradient& op, vlk::SortedTokens tokens, int64_t first_block,
                              int64_t last_block);
)
