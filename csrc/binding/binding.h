// Shared by the binding files: from torch's stable tensors to what the kernels take (raw pointers, sizes, a
// Dtype). User errors are found in Python; the checks here keep a wrong call from touching foreign memory.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
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

// A new contiguous tensor on the device of `like`. Straight from the allocator: through the dispatcher, as new_empty of the
// stable ABI goes, every tensor costs microseconds of host time.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
    constexpr size_t most_dims = 64;
    const size_t dims = sizes.size();
    STD_TORCH_CHECK(dims <= most_dims, "tensors have at most ", most_dims, " dimensions, got ", dims);
    std::array<int64_t, most_dims> strides;
    int64_t stride = 1;
    for (size_t d = dims; d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
    int32_t device_type = 0;
    STD_TORCH_CHECK(aoti_torch_get_device_type(like.get(), &device_type) == 0, "a tensor without a device");
    AtenTensorHandle made = nullptr;
    const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    STD_TORCH_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dims), sizes.data(), strides.data(), code, device_type,
                                             like.get_device_index(), &made) == 0,
                    "out of memory");
    return Tensor(made);
}

inline Tensor new_like(const Tensor& like) { return new_tensor(like, like.sizes(), like.scalar_type()); }

inline Tensor new_float(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    return new_tensor(like, sizes, ScalarType::Float);
}

// What stands for an output that a call does not have.
inline Tensor no_tensor(const Tensor& like) {
    return new_tensor(like, {int64_t{0}}, like.scalar_type());
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
