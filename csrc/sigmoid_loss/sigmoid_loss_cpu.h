#pragma once
#include <cstdint>

#include "primitives/cpu_isa.h"

namespace vlk {

// A tile of pairs whose similarities are known; those of equal id are positive.
struct SigmoidTile {
    int64_t rows, columns;
    float* tile;  // [rows, columns] similarities; with `gradient` derivatives of the losses by logits take their place
    const int32_t *row_ids, *column_ids;
    float scale, bias;
    bool gradient;
    float* sums;  // [rows, 3] of losses, and with `gradient` of derivatives times similarities, and of derivatives
};

}  // namespace vlk

VLK_DECLARE_CPU(
    // Rows begin .. end. A row's sums are the same whatever the others are.
    void weigh_pairs(const vlk::SigmoidTile& op, int64_t begin, int64_t end);
)
