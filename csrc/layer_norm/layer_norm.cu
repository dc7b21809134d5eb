#include "layer_norm/layer_norm.cuh"
#include "layer_norm/layer_norm_cuda.h"
#include "primitives/cuda_launch.cuh"

namespace vlk {

const char* layer_norm_forward_cuda(const LayerNormForward& op, void* stream) {
    CudaLaunch launch(stream);
    launch_layer_norm_forward(op, launch);
    return launch.error();
}

const char* layer_norm_backward_cuda(const LayerNormBackward& op, const PartialRows<3>& sums, void* stream) {
    CudaLaunch launch(stream);
    launch_layer_norm_backward(op, sums, launch);
    return launch.error();
}

}  // namespace vlk
