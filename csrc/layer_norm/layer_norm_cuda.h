#pragma once
#include "layer_norm/layer_norm.h"
#include "primitives/partial_rows.h"

namespace vlk {

// Launch on a stream of the current device; null, or what a launch was refused for.
const char* layer_norm_forward_cuda(const LayerNormForward& op, void* stream);
const char* layer_norm_backward_cuda(const LayerNormBackward& op, const PartialRows<3>& sums, void* stream);

}  // namespace vlk
