#pragma once
#include "primitives/norm.h"
#include "primitives/philox.h"

namespace vlk {

// z = sum_c tables[c][ids[:, c]] + dense, in float; y = dropout(LN(z)), each row by its own norm.
// Tables, dense, y and gradients share `dtype`.
struct EmbeddingSum {
    Dtype dtype;
    int64_t width, rows, num_tables;
    const int32_t* ids;         // [rows, num_tables]; negative: that table adds nothing to the row
    const void* const* tables;
    const void* dense;          // null: none
};

// Which row of `weight` and `bias` a row takes; a negative id: none, and its y and gradients are zero.
struct RowNorms {
    const int32_t* ids;         // [rows]; null: one norm for all
    int64_t count;
};

struct EmbedLayerNormForward {
    EmbeddingSum sum;
    RowNorms norms;
    float eps;
    Parameter weight, bias;     // [norms, width]
    Dropout dropout;
    void* y;
    float* mean;
    float* rstd;
};

// The sum is built again instead of being kept.
struct EmbedLayerNormBackward {
    EmbeddingSum sum;
    RowNorms norms;
    int64_t num_chunks;
    const void* dy;
    const float* mean;
    const float* rstd;
    Parameter weight;
    Dropout dropout;
    void* dz;
    float* partials;            // [num_chunks, 2, norms, width]: dweight, dbias
};

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
    const int32_t* ids;         // of token t: ids[t * stride]; negative: none
    int64_t stride;
};

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
