// One register of floats at a time, for the row kernels: GCC and Clang vector types at the width of the
// instruction set being compiled, because reductions and dtype conversions written as plain loops come out
// several times slower. Include from *_cpu.cpp files only (see cpu_isa.h).
#pragma once
#include <cstdint>
#include <cstring>

#include "primitives/cpu_scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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
struct Whole {
    static constexpr int count = lanes;
};
struct Part {
    int count;
};

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

// Compilers split these conversions into several shuffles, so x86 gets its instructions by name.
#if defined(__AVX512F__)
constexpr __mmask16 all_lanes = 0xffff;  // GCC 12 warns about the forms without a mask
inline Words widen(Shorts from) {
    return cast_bits<Words>(_mm512_maskz_cvtepu16_epi32(all_lanes, cast_bits<__m256i>(from)));
}
inline Words widen(Bytes from) {
    return cast_bits<Words>(_mm512_maskz_cvtepu8_epi32(all_lanes, cast_bits<__m128i>(from)));
}
inline Shorts narrow(Words from) {
    return cast_bits<Shorts>(_mm512_maskz_cvtepi32_epi16(all_lanes, cast_bits<__m512i>(from)));
}
typedef uint16_t HalfWords __attribute__((vector_size(64)));
// The upper halves of words, and words with nothing below them: one instruction each instead of two.
inline Shorts upper_halves(Words from) {
    constexpr HalfWords upper = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    return cast_bits<Shorts>(_mm512_castsi512_si256(_mm512_maskz_permutexvar_epi16(
        0xffff, cast_bits<__m512i>(upper), cast_bits<__m512i>(from))));
}
inline Words raise(Shorts from) {
    constexpr HalfWords doubled = {0, 0, 1, 1, 2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,
                                   8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
    return cast_bits<Words>(_mm512_maskz_permutexvar_epi16(
        0xaaaaaaaa, cast_bits<__m512i>(doubled), _mm512_castsi256_si512(cast_bits<__m256i>(from))));
}
inline Floats float_of_half(Shorts from) {
    return cast_bits<Floats>(_mm512_maskz_cvtph_ps(all_lanes, cast_bits<__m256i>(from)));
}
inline Shorts half_of_float(Floats from) {
    return cast_bits<Shorts>(_mm512_maskz_cvtps_ph(all_lanes, cast_bits<__m512>(from),
                                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
inline Words widen(Shorts from) { return cast_bits<Words>(_mm256_cvtepu16_epi32(cast_bits<__m128i>(from))); }
inline Words widen(Bytes from) {
    return cast_bits<Words>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(cast_bits<int64_t>(from))));
}
inline Shorts narrow(Words from) {  // every word fits 16 bits
    const __m256i packed = _mm256_packus_epi32(cast_bits<__m256i>(from), _mm256_setzero_si256());
    return cast_bits<Shorts>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
inline Floats float_of_half(Shorts from) {
    return cast_bits<Floats>(_mm256_cvtph_ps(cast_bits<__m128i>(from)));
}
inline Shorts half_of_float(Floats from) {
    return cast_bits<Shorts>(
        _mm256_cvtps_ph(cast_bits<__m256>(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline Words widen(Shorts from) { return __builtin_convertvector(from, Words); }
inline Words widen(Bytes from) { return __builtin_convertvector(from, Words); }
inline Shorts narrow(Words from) { return __builtin_convertvector(from, Shorts); }
inline Floats float_of_half(Shorts from) {
    Floats to;
    for (int lane = 0; lane < lanes; ++lane) to[lane] = to_float(float16{from[lane]});
    return to;
}
inline Shorts half_of_float(Floats from) {
    Shorts to;
    for (int lane = 0; lane < lanes; ++lane) to[lane] = from_float<float16>(from[lane]).bits;
    return to;
}
#endif

#if !defined(__AVX512F__)
inline Shorts upper_halves(Words from) { return narrow(from >> 16); }
inline Words raise(Shorts from) { return widen(from) << 16; }
#endif

// A register of floats as T holds it in memory, and back. T is named by a value, as in visit().
inline Floats pack_as(float, Floats value) { return value; }
inline Shorts pack_as(float16, Floats value) { return half_of_float(value); }
inline Shorts pack_as(bfloat16, Floats value) {
    const Words bits = cast_bits<Words>(value);
    const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return upper_halves(value == value ? rounded : (Words{} + 0x7fc00000));
}
inline Floats unpack(float, Floats packed) { return packed; }
inline Floats unpack(float16, Shorts packed) { return float_of_half(packed); }
inline Floats unpack(bfloat16, Shorts packed) { return cast_bits<Floats>(raise(packed)); }

template <typename T>
inline Floats load(const T* from, Whole) {
    return unpack(T{}, load_as<decltype(pack_as(T{}, Floats{}))>(from));
}

// Returns what was stored: the value rounded to T.
template <typename T>
inline Floats store(T* to, Floats value, Whole) {
    const auto packed = pack_as(T{}, value);
    std::memcpy(to, &packed, sizeof packed);
    return unpack(T{}, packed);
}

// Lanes past the end of the row read as zero and are not written.
template <typename T>
inline Floats load(const T* from, Part part) {
    T padded[lanes] = {};
    std::memcpy(padded, from, part.count * sizeof(T));
    return load(padded, Whole{});
}

inline Floats zero_past_end(Floats value, Whole) { return value; }

inline Floats zero_past_end(Floats value, Part part) {
    for (int lane = part.count; lane < lanes; ++lane) value[lane] = 0.0f;
    return value;
}

template <typename T>
inline Floats store(T* to, Floats value, Part part) {
    T padded[lanes];
    const Floats stored = store(padded, value, Whole{});
    std::memcpy(to, padded, part.count * sizeof(T));
    return zero_past_end(stored, part);
}

// body(column, chunk, k) over a row; k = 0..3 is a constant in the unrolled loop, so that sums can run in
// four registers.
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
        typedef float Four __attribute__((vector_size(16)));
        const Floats sum = (partial[0] + partial[1]) + (partial[2] + partial[3]);
        Four parts[lanes / 4];
        std::memcpy(parts, &sum, sizeof sum);
        for (int part = 1; part < lanes / 4; ++part) parts[0] += parts[part];
        return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
    }
};

// Stores past the caches, which saves reading the target first. The row it belongs to begins and ends on a
// boundary of 64 bytes; finish_streams() makes what was stored visible to other threads.
#if defined(__AVX512F__)
inline void stream_packed(void* to, Floats packed) {
    _mm512_stream_ps(static_cast<float*>(to), cast_bits<__m512>(packed));
}
inline void stream_packed(void* to, Shorts packed) {
    _mm256_stream_si256(static_cast<__m256i*>(to), cast_bits<__m256i>(packed));
}
#elif defined(__AVX2__)
inline void stream_packed(void* to, Floats packed) {
    _mm256_stream_ps(static_cast<float*>(to), cast_bits<__m256>(packed));
}
inline void stream_packed(void* to, Shorts packed) {
    _mm_stream_si128(static_cast<__m128i*>(to), cast_bits<__m128i>(packed));
}
#elif defined(__x86_64__)
inline void stream_packed(void* to, Floats packed) {
    _mm_stream_ps(static_cast<float*>(to), cast_bits<__m128>(packed));
}
inline void stream_packed(void* to, Shorts packed) {
    _mm_stream_si64(static_cast<long long*>(to), cast_bits<long long>(packed));
}
#else
template <typename Packed>
inline void stream_packed(void* to, Packed packed) {
    std::memcpy(to, &packed, sizeof packed);
}
#endif

template <typename T>
inline void store_past_caches(T* to, Floats value, Whole) {
    stream_packed(to, pack_as(T{}, value));
}

template <typename T>
inline void store_past_caches(T* to, Floats value, Part part) {
    store(to, value, part);
}

// Copies a row past the caches; bytes is a multiple of 64.
inline void stream(void* to, const void* from, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += sizeof(Floats))
        stream_packed(static_cast<char*>(to) + byte, load_as<Floats>(static_cast<const char*>(from) + byte));
}

inline void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Memory of one kernel call on one thread, aligned for streams, with room for a register past the end.
template <typename T>
class Scratch {
  public:
    explicit Scratch(int64_t count)
        : memory_(count > 0 ? __builtin_malloc(count * sizeof(T) + 128) : nullptr) {}
    ~Scratch() { __builtin_free(memory_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* get() const {
        return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63});
    }

  private:
    void* memory_;
};

}  // namespace vlk::VLK_ISA
