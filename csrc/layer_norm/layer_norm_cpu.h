#pragma once
#include "layer_norm/layer_norm.h"
#include "primitives/cpu_isa.h"

VLK_DECLARE_CPU(
    void layer_norm_forward(const vlk::LayerNormForward& op, int64_t first_row, int64_t last_row);
    void layer_norm_backward(const vlk::LayerNormBackward& op, int64_t first_chunk, int64_t last_chunk);
)
