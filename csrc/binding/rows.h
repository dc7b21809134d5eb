// Tensors as rows of bytes, for the bindings of ops that move rows of any dtype.
#pragma once
#include "binding/binding.h"

namespace vlk {

// The rows of a contiguous tensor [rows, ...], or [B, T, ...] with leading = 2, as bytes, whatever the dtype.
struct Rows {
    explicit Rows(const Tensor& tensor, int64_t leading = 1) : count(1), width(1) {
        check_contiguous(tensor, "packed tensor");
        for (int64_t d = 0; d < tensor.dim(); ++d) (d < leading ? count : width) *= tensor.size(d);
        bytes = width * static_cast<int64_t>(tensor.element_size());
        data = static_cast<const char*>(tensor.const_data_ptr());
    }
    const char* at(int64_t row) const { return data + row * bytes; }

    int64_t count, width, bytes;
    const char* data;
};

// A new tensor of the dtype of `like` for this many rows; `shape` is what it has in their place, the rest is as in `like`.
inline Tensor new_rows(const Tensor& like, std::vector<int64_t> shape, int64_t like_leading = 1) {
    for (int64_t d = like_leading; d < like.dim(); ++d) shape.push_back(like.size(d));
    return torch::stable::new_empty(like, shape);
}

}  // namespace vlk
