#include "packing/packing_cpu.h"

#include <cstring>

#include "primitives/cpu_scalar.h"

namespace vlk::VLK_ISA {

namespace {

constexpr int64_t kColumns = 1024;  // accumulators on the stack: they stay in the first-level cache while the rows stream past

template <typename T>
void sum_columns(const char* const* rows, int64_t count, float divisor, int64_t column, int64_t columns, T* out) {
    float sum[kColumns];
    for (int64_t j = 0; j < columns; ++j) sum[j] = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        const T* row = reinterpret_cast<const T*>(rows[i]) + column;
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) sum[j] += to_float(row[j]);
    }
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) out[column + j] = from_float<T>(sum[j] / divisor);
}

}  // namespace

void copy_rows(const char* const* sources, int64_t row_bytes, char* target, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
        // One copy for as many rows as lie behind each other in the source too.
        const char* const first = sources[row];
        int64_t last = row + 1;
        if (first == nullptr) {
            while (last < end && sources[last] == nullptr) ++last;
            std::memset(target + row * row_bytes, 0, (last - row) * row_bytes);
        } else {
            while (last < end && sources[last] == first + (last - row) * row_bytes) ++last;
            std::memcpy(target + row * row_bytes, first, (last - row) * row_bytes);
        }
        row = last;
    }
}

void sum_rows(Dtype dtype, const char* const* sources, const int64_t* first, const float* divisors, int64_t width, char* target,
              int64_t begin, int64_t end) {
    visit(dtype, [&](auto element) {
        using T = decltype(element);
        for (int64_t row = begin; row < end; ++row) {
            T* out = reinterpret_cast<T*>(target) + row * width;
            const int64_t count = first[row + 1] - first[row];
            if (count == 0) {
                std::memset(out, 0, width * sizeof(T));
            } else if (count == 1 && divisors == nullptr) {
                std::memcpy(out, sources[first[row]], width * sizeof(T));
            } else {
                const float divisor = divisors == nullptr ? 1.0f : divisors[row];
                for (int64_t column = 0; column < width; column += kColumns) {
                    const int64_t columns = width - column < kColumns ? width - column : kColumns;
                    sum_columns<T>(sources + first[row], count, divisor, column, columns, out);
                }
            }
        }
    });
}

}  // namespace vlk::VLK_ISA
