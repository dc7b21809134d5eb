#pragma once
#include "packing/packing.h"

namespace vlk {

// Launch on a stream of the current device; null, or what a launch was refused for.
const char* join_segments_cuda(const JoinSegments& op, void* stream);
const char* split_segments_cuda(const SplitSegments& op, void* stream);
const char* take_rows_cuda(const TakeRows& op, void* stream);
const char* take_rows_backward_cuda(const TakeRowsBackward& op, void* stream);
const char* mean_segment_cuda(const MeanSegment& op, void* stream);
const char* mean_segment_backward_cuda(const MeanSegmentBackward& op, void* stream);

}  // namespace vlk
