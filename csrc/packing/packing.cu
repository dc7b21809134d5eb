#include "packing/packing.cuh"
#include "packing/packing_cuda.h"
#include "primitives/cuda_launch.cuh"

namespace vlk {

const char* join_segments_cuda(const JoinSegments& op, void* stream) {
    CudaLaunch launch(stream);
    launch_join_segments(op, launch);
    return launch.error();
}

const char* split_segments_cuda(const SplitSegments& op, void* stream) {
    CudaLaunch launch(stream);
    launch_split_segments(op, launch);
    return launch.error();
}

const char* take_rows_cuda(const TakeRows& op, void* stream) {
    CudaLaunch launch(stream);
    launch_take_rows(op, launch);
    return launch.error();
}

const char* take_rows_backward_cuda(const TakeRowsBackward& op, void* stream) {
    CudaLaunch launch(stream);
    launch_take_rows_backward(op, launch);
    return launch.error();
}

const char* mean_segment_cuda(const MeanSegment& op, void* stream) {
    CudaLaunch launch(stream);
    launch_mean_segment(op, launch);
    return launch.error();
}

const char* mean_segment_backward_cuda(const MeanSegmentBackward& op, void* stream) {
    CudaLaunch launch(stream);
    launch_mean_segment_backward(op, launch);
    return launch.error();
}

}  // namespace vlk
