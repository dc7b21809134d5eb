// One register of floats at a time, for the row kernels: GCC and Clang vector types at the width of the instruction set being
// compiled, because reductions and dtype conversions written as plain loops come out several times slower.
// Include from *_cpu.cpp files only (see cpu_isa.h).
#pragma once
#include <cstdint>
#include <cstring>

#include "primitives/cpu_scalar.h"

namespace vlk::VLK_ISA {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * lanes)));
typedef int32_t Ints __attribute__((vector_size(4 * lanes)));
typedef uint32_t Words __attribute__((vector_size(4 * lanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * lanes)));
typedef uint8_t Bytes __attribute__((vector_size(lanes)));

// How much of a register a chunk of a row fills.
struct Whole { static constexpr int count = lanes; };
struct Part { int count; };

template <typename To, typename From>
inline To cast_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <typename Vector, typename T>
inline Vector load_as(const T* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline Floats load(const float* from, Whole) { return load_as<Floats>(from); }

inline Floats load(const bfloat16* from, Whole) {
    return cast_bits<Floats>(__builtin_convertvector(load_as<Shorts>(from), Words) << 16);
}

inline Floats load(const float16* from, Whole) {
    Floats to;
    for (int lane = 0; lane < lanes; ++lane) to[lane] = to_float(from[lane]);
    return to;
}

inline void store(float* to, Floats value, Whole) { std::memcpy(to, &value, sizeof value); }

inline void store(bfloat16* to, Floats value, Whole) {
    const Words bits = cast_bits<Words>(value);
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words stored = (bits & 0x7fffffff) > 0x7f800000 ? (Words{} + 0x7fc0) : rounded;
    const Shorts halves = __builtin_convertvector(stored, Shorts);
    std::memcpy(to, &halves, sizeof halves);
}

inline void store(float16* to, Floats value, Whole) {
    for (int lane = 0; lane < lanes; ++lane) to[lane] = from_float<float16>(value[lane]);
}

// Lanes past the end of the row read as zero and are not written.
template <typename T>
inline Floats load(const T* from, Part part) {
    T padded[lanes] = {};
    std::memcpy(padded, from, part.count * sizeof(T));
    return load(padded, Whole{});
}

template <typename T>
inline void store(T* to, Floats value, Part part) {
    T padded[lanes];
    store(padded, value, Whole{});
    std::memcpy(to, padded, part.count * sizeof(T));
}

inline Floats zero_past_end(Floats value, Whole) { return value; }

inline Floats zero_past_end(Floats value, Part part) {
    for (int lane = part.count; lane < lanes; ++lane) value[lane] = 0.0f;
    return value;
}

// body(column, chunk, k) over a row; k = 0..3 is a constant in the unrolled loop, so that sums can run in four registers.
template <typename Body>
inline void for_chunks(int64_t width, const Body& body) {
    int64_t column = 0;
    for (; column + 4 * lanes <= width; column += 4 * lanes) {
        body(column, Whole{}, 0);
        body(column + lanes, Whole{}, 1);
        body(column + 2 * lanes, Whole{}, 2);
        body(column + 3 * lanes, Whole{}, 3);
    }
    for (; column + lanes <= width; column += lanes) body(column, Whole{}, 0);
    if (column < width) body(column, Part{static_cast<int>(width - column)}, 1);
}

struct RowSum {
    Floats partial[4] = {};
    float total() const {
        const Floats sum = (partial[0] + partial[1]) + (partial[2] + partial[3]);
        float total = 0.0f;
        for (int lane = 0; lane < lanes; ++lane) total += sum[lane];
        return total;
    }
};

// Memory of one kernel call on one thread, with room for a whole register past the end.
template <typename T>
class Scratch {
  public:
    explicit Scratch(int64_t count) : data_(count > 0 ? static_cast<T*>(__builtin_malloc(count * sizeof(T) + sizeof(Floats))) : nullptr) {}
    ~Scratch() { __builtin_free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* get() const { return data_; }

  private:
    T* data_;
};

}  // namespace vlk::VLK_ISA
