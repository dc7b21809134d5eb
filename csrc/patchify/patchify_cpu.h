#pragma once
#include "patchify/patchify.h"
#include "primitives/cpu_isa.h"

VLK_DECLARE_CPU(
    // Rows [begin, end) of the patches.
    void patchify(const vlk::Patchify& op, int64_t begin, int64_t end);

    // Lines [begin, end) of pixels, of all images and channels.
    void patchify_backward(const vlk::PatchifyBackward& op, int64_t begin, int64_t end);
)
