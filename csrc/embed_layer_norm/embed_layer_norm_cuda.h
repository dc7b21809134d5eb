#pragma once
#include "embed_layer_norm/embed_layer_norm.h"
#include "embed_layer_norm/table_gradients.h"
#include "primitives/partial_rows.h"

namespace vlk {

// Launch on a stream of the current device; null, or what a launch was refused for.
const char* embed_layer_norm_forward_cuda(const EmbedLayerNormForward& op, void* stream);
const char* embed_layer_norm_backward_cuda(const EmbedLayerNormBackward& op, const PartialRows<2>& sums, void* stream);
const char* table_gradients_cuda(const TableGradients& op, void* stream);

}  // namespace vlk
