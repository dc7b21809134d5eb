#include "packing/packing_cpu.h"

#include <cstring>

#include "primitives/cpu_vector.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

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

// `bytes` from `source`, or zeros where that is null.
void write(const char* source, int64_t bytes, char* target) {
    if (source == nullptr) {
        std::memset(target, 0, bytes);
    } else {
        std::memcpy(target, source, bytes);
    }
}

#ifdef __SSE2__
// The same past the caches: an ordinary store first reads the line that it is about to overwrite. Needs multiples of 16 bytes.
void write_through(const char* source, int64_t bytes, char* target) {
    for (int64_t i = 0; i < bytes; i += 16) {
        const __m128i* const from = reinterpret_cast<const __m128i*>(source + i);
        _mm_stream_si128(reinterpret_cast<__m128i*>(target + i), source == nullptr ? _mm_setzero_si128() : _mm_loadu_si128(from));
    }
}
void finish_writes() { _mm_sfence(); }
#else
constexpr auto write_through = write;
void finish_writes() {}
#endif

}  // namespace

void copy_rows(const char* const* sources, int64_t row_bytes, char* target, int64_t begin, int64_t end, bool through) {
    const auto write_run = through ? write_through : write;
    for (int64_t row = begin; row < end;) {
        // One write for as many rows as lie behind each other in the source too, or are all zero.
        const char* const first = sources[row];
        const int64_t step = first == nullptr ? 0 : row_bytes;
        int64_t last = row + 1;
        while (last < end && sources[last] == first + (last - row) * step) ++last;
        write_run(first, (last - row) * row_bytes, target + row * row_bytes);
        row = last;
    }
    if (through) finish_writes();
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
