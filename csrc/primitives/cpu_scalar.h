// Half-precision elements for the CPU kernels: float in registers, 16 bits in memory. Shifts and selects,
// so that loops over them vectorise on every level and every compiler. For *_cpu.cpp files (see cpu_isa.h).
#pragma once
#include <cstdint>
#include <cstring>

#include "primitives/dtype.h"

namespace vlk::VLK_ISA {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(float16 value) {
    const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
    // Rebias the exponent; subnormals by an exact multiplication, infinities and NaN to the top exponent.
    const uint32_t scaled = bits_of(float_of(magnitude) * float_of(0x77800000));  // 2^112
    const uint32_t special = magnitude | 0x7f800000;
    return float_of(sign | (magnitude >= 0x0f800000 ? special : scaled));
}

// Round to nearest, ties to even, as PyTorch does.
template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) { return value; }

template <>
inline bfloat16 from_float<bfloat16>(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

template <>
inline float16 from_float<float16>(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const uint32_t overflow = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return {static_cast<uint16_t>((bits >> 16 & 0x8000) | (magnitude >= 0x477ff000 ? overflow : finite))};
}

// Calls work with a value of the type that `dtype` names:
// visit(dtype, [&](auto element) { using T = decltype(element); ... })
template <typename Work>
void visit(Dtype dtype, const Work& work) {
    switch (dtype) {
        case Dtype::float32: return work(float{});
        case Dtype::bfloat16: return work(bfloat16{});
        case Dtype::float16: return work(float16{});
    }
}

}  // namespace vlk::VLK_ISA
