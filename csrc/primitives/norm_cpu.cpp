#include "primitives/cpu_norm.h"

namespace vlk::VLK_ISA {

void sum_partial_rows(const float* partials, int64_t count, int64_t stride, Dtype dtype, void* out,
                      int64_t begin, int64_t end) {
    visit(dtype, [&](auto element) {
        using T = decltype(element);
        T* to = static_cast<T*>(out) + begin;
        for_chunks(end - begin, [&](int64_t column, auto chunk, int) {
            Floats sum{};
            for (int64_t row = 0; row < count; ++row)
                sum += load(partials + row * stride + begin + column, chunk);
            store(to + column, sum, chunk);
        });
    });
}

}  // namespace vlk::VLK_ISA
