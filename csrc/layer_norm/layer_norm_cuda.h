#pragma once
#include "layer_norm/layer_norm.h"

namespace vlk {

// Launches on a stream of the current device; null, or what the launch was refused for.
const char* layer_norm_forward_cuda(const LayerNormForward& op, void* stream);

}  // namespace vlk
