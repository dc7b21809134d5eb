// How the CUDA kernels divide patchify: a pure function of sizes and alignment, for the launcher and the emulator.
#pragma once
#include "patchify/patchify.h"
#include "primitives/row_copy_plan.h"

namespace vlk {

inline int element_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Neighbouring pixels that a thread moves at once: as many as one access takes, two, or one. They lie in one patch.
inline int pixels_at_once(const PatchGrid& grid, Dtype dtype, const void* patches, const void* images, int image_bytes) {
    for (const int pixels : {16 / element_bytes(dtype), 2}) {
        const auto fits = [&](const void* data, int bytes) { return reinterpret_cast<uintptr_t>(data) % (pixels * bytes) == 0; };
        if (grid.patch % pixels == 0 && grid.width % pixels == 0 && fits(patches, element_bytes(dtype)) && fits(images, image_bytes))
            return pixels;
    }
    return 1;
}

inline int pixels_at_once(const Patchify& op) {
    return pixels_at_once(op.grid, op.dtype, op.patches, op.images, op.images_are_bytes ? 1 : element_bytes(op.dtype));
}
inline int pixels_at_once(const PatchifyBackward& op) {
    return pixels_at_once(op.grid, op.dtype, op.patches, op.images, element_bytes(op.dtype));
}

// Rows of patches, and lines of pixels.
inline RowCopyPlan plan_rows(const Patchify& op) {
    const int bytes = element_bytes(op.dtype);
    return plan_row_copy(op.grid.rows, patch_elements(op.grid) * bytes, pixels_at_once(op) * bytes);
}
inline RowCopyPlan plan_rows(const PatchifyBackward& op) {
    const int bytes = element_bytes(op.dtype);
    return plan_row_copy(lines_of(op.grid), op.grid.width * bytes, pixels_at_once(op) * bytes);
}

}  // namespace vlk
