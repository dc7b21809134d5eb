// The transport distance of packed samples, and its gradient from the plans that the forward has kept.
#pragma once
#include <cstdint>

#include "primitives/cpu_isa.h"
#include "primitives/dtype.h"

namespace vlk {

// Contiguous tokens [rows, width]; sample b holds `lengths[b * step]` rows from row `starts[b * step]` on.
struct TokenRows {
    const void* data = nullptr;
    const int32_t *starts = nullptr, *lengths = nullptr;
    int64_t step = 1, longest = 0;
};

struct Transport {
    Dtype dtype;
    int64_t width;
    TokenRows texts, images;
    float* plans;  // [samples, longest text, longest image], zeros in the padding; null when not wanted
};

struct TransportForward : Transport {
    float beta;
    int64_t iterations;
    float* distances;
};

struct TransportBackward : Transport {
    const float* grad_distances;
    void *grad_texts, *grad_images;
};

}  // namespace vlk

VLK_DECLARE_CPU(
    // Samples begin .. end.
    void optimal_transport_forward(const vlk::TransportForward& op, int64_t begin, int64_t end);
    // Samples begin .. end; rows that belong to no sample are left alone.
    void optimal_transport_backward(const vlk::TransportBackward& op, int64_t begin, int64_t end);
)
