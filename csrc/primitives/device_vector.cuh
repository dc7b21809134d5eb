// Elements in memory and floats in registers, for CUDA kernels: conversions, and loads and stores of several
// neighbours at once.
#pragma once
#include <cstdint>
#include <cstring>

#include "primitives/device.h"
#include "primitives/dtype.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace vlk {

using bfloat16 = __nv_bfloat16;
using float16 = __half;
using Words = uint4;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(float16 value) { return __half2float(value); }

template <typename T>
__device__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ __forceinline__ float16 from_float<float16>(float value) { return __float2half_rn(value); }

// Sixteen bytes by one access, where the compiler takes an assignment apart into elements now and then.
__device__ __forceinline__ Words load_words(const void* from) {
    Words words;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(__cvta_generic_to_global(from)));
    return words;
}

__device__ __forceinline__ void store_words(void* to, Words words) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x),
                 "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
}

// Two at once take one instruction, where one alone takes a slow one.
__device__ __forceinline__ void from_floats(float low, float high, bfloat16* to) {
    *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(low, high);
}
__device__ __forceinline__ void from_floats(float low, float high, float16* to) {
    *reinterpret_cast<__half2*>(to) = __floats2half2_rn(low, high);
}
__device__ __forceinline__ void from_floats(float low, float high, float* to) {
    to[0] = low;
    to[1] = high;
}

}  // namespace vlk

#else
// In the emulator: the conversions of the CPU kernels, which round as a device does.
#define VLK_ISA emulated
#include "primitives/cpu_scalar.h"

namespace vlk {

using emulated::bfloat16;
using emulated::float16;
using emulated::from_float;
using emulated::to_float;
struct alignas(16) Words {
    uint32_t x, y, z, w;
};
inline Words load_words(const void* from) { return *static_cast<const Words*>(from); }
inline void store_words(void* to, Words words) { *static_cast<Words*>(to) = words; }

template <typename T>
void from_floats(float low, float high, T* to) {
    to[0] = from_float<T>(low);
    to[1] = from_float<T>(high);
}

}  // namespace vlk
#endif

namespace vlk {

constexpr int access_bytes = 16;  // the widest load or store of one thread

// V neighbours, moved by one access.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
    static_assert(sizeof(T) * V <= access_bytes, "no access is that wide");
    T at[V];
};

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> load_vector(const T* from) {
    return *reinterpret_cast<const Vector<T, V>*>(from);
}

template <typename T, int V>
__device__ __forceinline__ void widen(const Vector<T, V>& from, float (&values)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = to_float(from.at[i]);
}

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> narrow(const float (&values)[V]) {
    Vector<T, V> to;
    if constexpr (V == 1) {
        to.at[0] = from_float<T>(values[0]);
    } else {
#pragma unroll
        for (int i = 0; i < V; i += 2) from_floats(values[i], values[i + 1], to.at + i);
    }
    return to;
}

// V values of a parameter, by as many accesses as they take.
template <typename T, int V>
__device__ __forceinline__ void load_floats(const T* from, float (&values)[V]) {
    constexpr int fitting = access_bytes / sizeof(T), width = V < fitting ? V : fitting;
#pragma unroll
    for (int first = 0; first < V; first += width) {
        const Vector<T, width> loaded = load_vector<T, width>(from + first);
#pragma unroll
        for (int i = 0; i < width; ++i) values[first + i] = to_float(loaded.at[i]);
    }
}

template <typename T, int V>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, V>& stored) {
    if constexpr (sizeof stored == sizeof(Words)) {
        Words words;
        memcpy(&words, &stored, sizeof words);
        store_words(to, words);
    } else {
        *reinterpret_cast<Vector<T, V>*>(to) = stored;
    }
}

// On the host: calls work with a value of the type that `dtype` names.
template <typename Work>
void visit_element(Dtype dtype, const Work& work) {
    switch (dtype) {
        case Dtype::float32: return work(float{});
        case Dtype::bfloat16: return work(bfloat16{});
        case Dtype::float16: return work(float16{});
    }
}

}  // namespace vlk
