#include "packing/packing_cpu.h"

#include <cstring>

#include "primitives/cpu_vector.h"

namespace vlk::VLK_ISA {

namespace {

// `registers` neighbouring columns' sums stay in registers while the rows stream past.
template <int registers, typename T, typename Chunk>
void sum_columns(const char* const* rows, int64_t count, float divisor, int64_t column, Chunk chunk, T* out) {
    Floats sum[registers] = {};
    for (int64_t i = 0; i < count; ++i) {
        const T* row = reinterpret_cast<const T*>(rows[i]) + column;
        for (int k = 0; k < registers; ++k) sum[k] += load(row + k * lanes, chunk);
    }
    for (int k = 0; k < registers; ++k) store(out + column + k * lanes, sum[k] / divisor, chunk);
}

template <typename T>
void sum_row(const char* const* rows, int64_t count, float divisor, int64_t width, T* out) {
    constexpr int wide = 8;
    int64_t column = 0;
    for (; column + wide * lanes <= width; column += wide * lanes) sum_columns<wide>(rows, count, divisor, column, Whole{}, out);
    for (; column + lanes <= width; column += lanes) sum_columns<1>(rows, count, divisor, column, Whole{}, out);
    if (column < width) sum_columns<1>(rows, count, divisor, column, Part{static_cast<int>(width - column)}, out);
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
                sum_row(sources + first[row], count, divisors == nullptr ? 1.0f : divisors[row], width, out);
            }
        }
    });
}

}  // namespace vlk::VLK_ISA
