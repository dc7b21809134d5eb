// The element types of the kernels, as plain values: the binding maps tensors to them, kernels switch.
#pragma once
#include <cstdint>

namespace vlk {

enum class Dtype : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

}  // namespace vlk
