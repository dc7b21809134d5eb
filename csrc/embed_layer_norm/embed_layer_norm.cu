#include "embed_layer_norm/embed_layer_norm.cuh"
#include "embed_layer_norm/embed_layer_norm_cuda.h"
#include "embed_layer_norm/table_gradients.cuh"
#include "primitives/cuda_launch.cuh"

namespace vlk {

const char* embed_layer_norm_forward_cuda(const EmbedLayerNormForward& op, void* stream) {
    CudaLaunch launch(stream);
    launch_embed_layer_norm_forward(op, launch);
    return launch.error();
}

const char* embed_layer_norm_backward_cuda(const EmbedLayerNormBackward& op, const PartialRows<2>& sums, void* stream) {
    CudaLaunch launch(stream);
    launch_embed_layer_norm_backward(op, sums, launch);
    return launch.error();
}

const char* table_gradients_cuda(const TableGradients& op, void* stream) {
    CudaLaunch launch(stream);
    launch_table_gradients(op, launch);
    return launch.error();
}

}  // namespace vlk
