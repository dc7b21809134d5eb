#pragma once
#include <cstdint>

#include "primitives/dtype.h"

namespace vlk {

// Where the gradient of a parameter goes, in the parameter's dtype.
struct Gradient {
    void* data = nullptr;  // null: not wanted
    Dtype dtype = Dtype::float32;
};

template <int Parts>
struct PartialRows {
    const float* partials;  // [count, Parts, width]
    int64_t count, width;
    Gradient gradients[Parts];
};

}  // namespace vlk
