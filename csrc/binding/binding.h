// Shared by the binding files: from torch's stable tensors to what the kernels take (raw pointers, sizes, a
// Dtype). User errors are found in Python; the checks here keep a wrong call from touching foreign memory.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "primitives/dtype.h"

namespace vlk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return Dtype::float32;
        case ScalarType::BFloat16: return Dtype::bfloat16;
        case ScalarType::Half: return Dtype::float16;
        default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
    }
}

inline void check_type(const Tensor& tensor, ScalarType type, const char* name) {
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must have the dtype ",
                    torch::headeronly::toString(type), ", got ",
                    torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_numel(const Tensor& tensor, int64_t numel, const char* name) {
    STD_TORCH_CHECK(tensor.numel() == numel, name, " must have ", numel, " elements, got ", tensor.numel());
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_same_device(const Tensor& tensor, std::initializer_list<std::optional<Tensor>> others) {
    for (const std::optional<Tensor>& other : others)
        STD_TORCH_CHECK(!other || (other->is_cuda() == tensor.is_cuda() &&
                                   other->get_device_index() == tensor.get_device_index()),
                        "all tensors must be on one device");
}

// The elements of a contiguous tensor of a known type (int32 layouts, float statistics).
template <typename T>
const T* read(const Tensor& tensor, ScalarType type, const char* name) {
    check_type(tensor, type, name);
    check_contiguous(tensor, name);
    return static_cast<const T*>(tensor.const_data_ptr());
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
    return tensor ? tensor->const_data_ptr() : nullptr;
}

inline Tensor new_float(const Tensor& like, const std::vector<int64_t>& sizes) {
    return torch::stable::new_empty(like, sizes, std::make_optional(ScalarType::Float));
}

// Whether rows begin and end where cache lines do, as stream() wants.
inline bool rows_fill_cache_lines(const Tensor& tensor) {
    const int64_t row_bytes = tensor.size(tensor.dim() - 1) * static_cast<int64_t>(tensor.element_size());
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 64 == 0 && row_bytes % 64 == 0;
}

// work(begin, end) over rows, on torch's threads. `row_bytes` is what one row reads and writes: a thread is
// worth waking for 64 KiB.
template <typename Work>
void parallel_rows(int64_t num_rows, int64_t row_bytes, const Work& work) {
    const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, row_bytes));
    torch::stable::parallel_for(0, num_rows, grain, work);
}

}  // namespace vlk
