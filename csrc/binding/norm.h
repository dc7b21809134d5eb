// What the bindings of the LayerNorm kernels share.
#pragma once
#include "binding/binding.h"
#include "primitives/norm.h"
#include "primitives/philox.h"

namespace vlk {

using OptionalTensor = std::optional<Tensor>;

inline Parameter parameter(const OptionalTensor& tensor, int64_t width, const char* name) {
    if (!tensor) return {};
    check_numel(*tensor, width, name);
    check_contiguous(*tensor, name);
    return {tensor->const_data_ptr(), dtype_of(*tensor, name)};
}

// A contiguous tensor of the data's dtype and size, or null.
inline const void* data_like(const OptionalTensor& tensor, const Tensor& data, const char* name) {
    if (!tensor) return nullptr;
    check_type(*tensor, data.scalar_type(), name);
    check_numel(*tensor, data.numel(), name);
    check_contiguous(*tensor, name);
    return tensor->const_data_ptr();
}

inline const float* row_statistics(const Tensor& tensor, int64_t rows, const char* name) {
    check_numel(tensor, rows, name);
    return read<float>(tensor, ScalarType::Float, name);
}

inline Dropout dropout_of(const OptionalTensor& state, const OptionalTensor& keys, int64_t stream,
                          int64_t threshold, int64_t rows) {
    if (threshold == 0) return {};
    STD_TORCH_CHECK(state.has_value() && threshold < 256,
                    "dropout needs a random state and a threshold below 256");
    check_numel(*state, 2, "rng_state");
    if (keys) check_numel(*keys, 2 * rows, "keys");
    return {read<int64_t>(*state, ScalarType::Long, "rng_state"),
            keys ? read<int32_t>(*keys, ScalarType::Int, "keys") : nullptr, stream,
            static_cast<int32_t>(threshold)};
}

// Partial rows of `parts` parameter gradients, and their sums.
class ChunkSums {
  public:
    ChunkSums(const Tensor& like, int64_t rows, int64_t parts, int64_t width)
        : chunks(num_row_chunks(rows)),
          parts_(parts),
          width_(width),
          memory_(new_float(like, {chunks, parts, width})) {}

    float* data() const { return static_cast<float*>(memory_.mutable_data_ptr()); }

    // The gradient of `parameter`, in its dtype and shape; an empty tensor when there is no such parameter.
    Tensor sum(int64_t part, const OptionalTensor& parameter) const {
        if (!parameter) return no_tensor(memory_);
        check_numel(*parameter, width_, "parameter");
        check_contiguous(*parameter, "parameter");
        Tensor gradient = new_like(*parameter);
        const float* partials = data() + part * width_;
        void* out = gradient.mutable_data_ptr();
        const Dtype dtype = dtype_of(gradient, "parameter");
        parallel_rows(width_, chunks * 4,
                      [&, kernel = VLK_CPU(sum_partial_rows)](int64_t begin, int64_t end) {
                          kernel(partials, chunks, parts_ * width_, dtype, out, begin, end);
                      });
        return gradient;
    }

    const int64_t chunks;

  private:
    const int64_t parts_, width_;
    const Tensor memory_;
};

}  // namespace vlk
