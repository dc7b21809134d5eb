// A row in the registers of the threads that share it, for CUDA kernels.
#pragma once
#include <type_traits>

#include "primitives/device_vector.cuh"
#include "primitives/norm.h"
#include "primitives/row_team.cuh"

namespace vlk {

// Whether a second row is asked for before the first is waited for. Single columns take a register each, whatever
// their size, and leave none for it.
template <int V>
constexpr bool early = V > 1;

// A thread's columns of a row as they lie in memory: half types take half the registers until they are used.
// Past the end of the row are zeros, so that only accesses, and the squares of differences, ask where it is.
template <typename T, int V, int N>
struct HeldRow {
    Vector<T, V> at[N];

    __device__ __forceinline__ void load(const void* data, int64_t start, int width) {
        const T* first = static_cast<const T*>(data) + start;
        for_groups<V, N>([&](int k, int column) {
            at[k] = column < width ? load_vector<T, V>(first + column) : Vector<T, V>{};
        });
    }
};

// work(k, values) with the parameter's values at this thread's columns, unless it is absent.
template <typename T, int V, int N, typename Work>
__device__ __forceinline__ void with_parameter(const Parameter& parameter, int width, const Work& work) {
    const auto read = [&](auto element) {
        const auto* data = static_cast<const decltype(element)*>(parameter.data);
        for_groups<V, N>([&](int k, int column) {
            float values[V] = {};
            if (column < width) load_floats<decltype(element), V>(data + column, values);
            work(k, values);
        });
    };
    if (!parameter.data) return;
    if (parameter.dtype == Dtype::float32)
        read(float{});
    else if constexpr (!std::is_same_v<T, float>)
        read(T{});
}

// V values of a parameter that is there.
template <typename T, int V>
__device__ __forceinline__ void load_parameter(const Parameter& parameter, int column, float (&values)[V]) {
    if (parameter.dtype == Dtype::float32)
        load_floats<float, V>(static_cast<const float*>(parameter.data) + column, values);
    else if constexpr (!std::is_same_v<T, float>)
        load_floats<T, V>(static_cast<const T*>(parameter.data) + column, values);
}

// work(k, i) for every column that this thread holds.
template <int V, int N, typename Work>
__device__ __forceinline__ void for_held(const Work& work) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
#pragma unroll
        for (int i = 0; i < V; ++i) work(k, i);
    }
}

template <typename T, int V, int N>
__device__ __forceinline__ void store_row(void* data, int64_t start, int width, const float (&values)[N][V]) {
    T* first = static_cast<T*>(data) + start;
    for_groups<V, N>([&](int k, int column) {
        if (column < width) store_vector(first + column, narrow<T, V>(values[k]));
    });
}

}  // namespace vlk
