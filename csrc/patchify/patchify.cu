#include "patchify/patchify.cuh"
#include "patchify/patchify_cuda.h"
#include "primitives/cuda_launch.cuh"

namespace vlk {

const char* patchify_cuda(const Patchify& op, void* stream) {
    CudaLaunch launch(stream);
    launch_patchify(op, launch);
    return launch.error();
}

const char* patchify_backward_cuda(const PatchifyBackward& op, void* stream) {
    CudaLaunch launch(stream);
    launch_patchify_backward(op, launch);
    return launch.error();
}

}  // namespace vlk
