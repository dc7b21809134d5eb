// What a LayerNorm of a sum of embeddings takes and gives, for the kernels of every device and their bindings.
#pragma once
#include "primitives/norm.h"
#include "primitives/philox.h"

namespace vlk {

constexpr int64_t most_tables = 16;  // of a CUDA kernel: a lane of a warp for each, and one for the dense term

// int32, or int64 where `wide`.
struct Ids {
    const void* data = nullptr;
    bool wide = false;
};

static inline VLK_HOST_DEVICE int64_t id_at(Ids ids, int64_t index) {
    return ids.wide ? static_cast<const int64_t*>(ids.data)[index] : static_cast<const int32_t*>(ids.data)[index];
}

// z = sum_c tables[c][ids[:, c]] + dense, in float; y = dropout(LN(z)), each row by its own norm.
// Tables, dense, y and gradients share `dtype`.
struct EmbeddingSum {
    Dtype dtype;
    int64_t width, rows, num_tables;
    Ids ids;                    // [rows, num_tables]; negative: that table adds nothing to the row
    const void* const* tables;  // this list and the next are the host's
    const int64_t* table_rows;
    const void* dense;          // null: none
};

// Which row of `weight` and `bias` a row takes; a negative id: none, and its y and gradients are zero.
struct RowNorms {
    Ids ids;                    // [rows]; null: one norm for all
    int64_t count;
};

static inline VLK_HOST_DEVICE int64_t norm_of(const RowNorms& norms, int64_t row) {
    return norms.ids.data ? id_at(norms.ids, row) : 0;
}

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

}  // namespace vlk
