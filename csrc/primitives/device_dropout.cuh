// Dropout in CUDA kernels: the decisions of neighbouring columns, drawn where they are needed.
#pragma once
#include "primitives/philox.h"
#include "primitives/row_team.cuh"

namespace vlk {

class DropoutDraw {
  public:
    __device__ __forceinline__ explicit DropoutDraw(const Dropout& dropout) : dropout_(dropout), key_{0, 0} {
        if (dropout.threshold) key_ = philox_key(dropout.state);
    }

    // The decisions of a thread's columns of a row, bit k * V + i for column i of its k-th group of V: drawn one
    // group after another while the row is on its way, so that they take one register in the end.
    template <int V, int N>
    __device__ __forceinline__ uint32_t kept_columns(int64_t row, int width) const {
        static_assert(V * N <= 32, "the decisions of a row fill at most one word");
        const PhiloxWords first = row_counter(dropout_, row);
        uint32_t kept = 0;
#pragma unroll 1
        for (int k = 0; k < N; ++k) {
            const int column = column_of<V, N>(k);
            if (column < width) kept |= kept_group<V>(first, column) << (k * V);
        }
        return kept;
    }

    template <int V>
    __device__ __forceinline__ uint32_t kept_group(int64_t row, int column) const {
        return kept_group<V>(row_counter(dropout_, row), column);
    }

  private:
    // Bit i: column `column + i` is kept. V divides columns_per_draw, and `column` by V.
    template <int V>
    __device__ __forceinline__ uint32_t kept_group(const PhiloxWords& first, int column) const {
        constexpr int columns = static_cast<int>(columns_per_draw);
        static_assert(columns % V == 0, "a group of columns crosses no draw");
        const PhiloxWords drawn =
            philox({static_cast<uint32_t>(column / columns), first.y, first.z, first.w}, key_);
        const int place = column % columns;
        uint32_t kept = 0;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const int byte = place + i;
            const uint32_t word = byte < 8 ? (byte < 4 ? drawn.x : drawn.y) : (byte < 12 ? drawn.z : drawn.w);
            kept |= static_cast<uint32_t>(static_cast<int>(word >> 8 * (byte % 4) & 255) >= dropout_.threshold) << i;
        }
        return kept;
    }

    const Dropout& dropout_;
    PhiloxKey key_;
};

}  // namespace vlk
