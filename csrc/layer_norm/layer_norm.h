// What a LayerNorm or an RMSNorm takes and gives, for the kernels of every device and their bindings. An RMSNorm is
// a LayerNorm that is not centered: `mean` is null, and there is no bias.
#pragma once
#include "primitives/norm.h"
#include "primitives/philox.h"

namespace vlk {

// z = residual + row_scale * dropout(x + linear_bias), y = the norm of z.
// x, residual, z, y and their gradients share `dtype`.
struct LayerNormForward {
    Dtype dtype;
    int64_t width, rows;
    float eps;
    const void* x;
    const void* residual;     // null: none
    Parameter linear_bias, weight, bias;
    const float* row_scale;   // null: none
    Dropout dropout;
    void* y;
    void* z;                  // null: not kept
    bool past_caches;         // y and z are too large to be in a cache still when they are read
    float* mean;              // null: not centered
    float* rstd;
};

// Without anything fused z is x, and is neither built nor kept.
static inline VLK_HOST_DEVICE bool is_fused(const LayerNormForward& op) {
    return op.residual || op.linear_bias.data || op.row_scale || op.dropout.threshold;
}

struct LayerNormBackward {
    Dtype dtype;
    int64_t width, rows, num_chunks;
    const void* dy;
    const void* dsum;         // gradient of the returned sum; null: none
    const void* z;
    const float* mean;        // null: not centered
    const float* rstd;
    Parameter weight;
    const float* row_scale;
    Dropout dropout;
    void* dz;                 // the residual's gradient
    void* dx;                 // null: the same as dz
    bool past_caches;         // dz and dx are too large to be in a cache still when they are read
    float* partials;          // [num_chunks, 3, width]: dweight, dbias, dlinear_bias
    bool sum_dx;              // dlinear_bias is wanted
};

}  // namespace vlk
