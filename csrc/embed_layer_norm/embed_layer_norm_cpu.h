#pragma once
#include "primitives/norm.h"
#include "primitives/philox.h"

namespace vlk {

// z = sum_c tables[c][ids[:, c]] + dense, in float; y = dropout(LN(z)).
// Tables, dense, y and gradients share `dtype`.
struct EmbeddingSum {
    Dtype dtype;
    int64_t width, rows, num_tables;
    const int32_t* ids;         // [rows, num_tables]; negative: that table adds nothing to the row
    const void* const* tables;
    const void* dense;          // null: none
};

struct EmbedLayerNormForward {
    EmbeddingSum sum;
    float eps;
    Parameter weight, bias;
    Dropout dropout;
    void* y;
    float* mean;
    float* rstd;
};

// The sum is built again instead of being kept.
struct EmbedLayerNormBackward {
    EmbeddingSum sum;
    int64_t num_chunks;
    const void* dy;
    const float* mean;
    const float* rstd;
    Parameter weight;
    Dropout dropout;
    void* dz;
    float* partials;            // [num_chunks, 2, width]: dweight, dbias
};

// The gradient of a table: row v is the sum of the rows order[first[v] : first[v + 1]] of dz, in that order.
struct TableGradient {
    Dtype dtype;
    int64_t width;
    const void* gradient;       // [rows, width]
    const int32_t* first;       // [table rows + 1]
    const int32_t* order;
    void* table;
};

// Table rows are cut into blocks of this many columns, so that tables of two rows occupy many threads too.
constexpr int64_t table_block_columns = 128;

}  // namespace vlk

VLK_DECLARE_CPU(
    void embed_layer_norm_forward(const vlk::EmbedLayerNormForward& op, int64_t first_row, int64_t last_row);
    void embed_layer_norm_backward(const vlk::EmbedLayerNormBackward& op, int64_t first_chunk,
                                   int64_t last_chunk);
    void table_gradient(const vlk::TableGradient& op, int64_t first_block, int64_t last_block);
)
