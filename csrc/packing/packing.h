// What the CUDA kernels of packing take. Rows are bytes wherever nothing is added up.
#pragma once
#include <cstdint>

#include "primitives/dtype.h"
#include "primitives/segments.h"

namespace vlk {

constexpr int most_segments = 16;  // of a sample, and therefore the most parts

// Tensors that hold the segments separately: padded, [samples, rows, ...], with one segment each, or packed, [rows, ...].
struct Parts {
    const int32_t* starts;           // [samples, per_sample]: at which row of its part a segment begins; null: the parts are padded
    int32_t count;
    int32_t part_of[most_segments];  // of each segment; -1: none
    char* data[most_segments];
    int64_t rows[most_segments];     // of the part; of each of its samples where it is padded
};

// Rows between a packed tensor and parts. Rows that belong to nobody come out as zeros, and so does what a layout puts outside of
// its tensors: it is not read.
struct MovedSegments {
    Segments segments;
    Parts parts;
    char* packed;
    int64_t packed_rows, row_bytes;
};
struct JoinSegments : MovedSegments {};   // from the parts
struct SplitSegments : MovedSegments {};  // to the parts

// int32 or int64.
struct Positions {
    const void* data;
    bool is_wide;
    int64_t count;
};

// Row m of the result is row positions[m] of x, zeros where that is no row of x or m has no position.
struct TakeRows {
    Positions positions;
    const char* x;
    int64_t x_rows;
    char* out;
    int64_t rows, row_bytes;
};

// Row r of the result is the sum, in float and in this order, of rows order[k] of grad with sorted[k] = r.
struct TakeRowsBackward {
    Dtype dtype;
    int64_t width;
    Positions sorted;      // rising
    const int64_t* order;  // where each of them stood; a stable sort keeps the order of equals
    const void* grad;
    void* out;
    int64_t rows;
};

// Row b of `mean` is the mean of the rows of `segment` of sample b of x, zeros where it has none.
struct MeanSegment {
    Dtype dtype;
    int64_t width;
    Segments segments;
    int32_t segment;
    const void* x;
    int64_t rows;
    void* mean;
};

// Every row of the segment gets its sample's row of grad over the length, all other rows zeros.
struct MeanSegmentBackward {
    Dtype dtype;
    int64_t width;
    Segments segments;
    int32_t segment;
    const void* grad;
    void* out;
    int64_t rows;
};

}  // namespace vlk
