// What LayerNorm kernels and their bindings agree on.
#pragma once
#include <cstdint>

#include "primitives/cpu_isa.h"
#include "primitives/dtype.h"

namespace vlk {

// A weight or bias in its own dtype; the kernels read it as float.
struct Parameter {
    const void* data = nullptr;  // null: absent
    Dtype dtype = Dtype::float32;
};

// Parameter gradients are summed in partial rows, one per chunk of rows, and then over the chunks. The chunks
// depend on the number of rows alone, never on threads, so the sums repeat to the last bit.
static inline int64_t num_row_chunks(int64_t rows) { return rows < 64 ? 1 : rows < 64 * 32 ? rows / 32 : 64; }

static inline int64_t chunk_start(int64_t chunk, int64_t num_chunks, int64_t rows) {
    return rows * chunk / num_chunks;
}

}  // namespace vlk

VLK_DECLARE_CPU(
    // out[columns begin..end) = sum over the `count` partial rows, which lie `stride` floats apart.
    void sum_partial_rows(const float* partials, int64_t count, int64_t stride, vlk::Dtype dtype, void* out,
                          int64_t begin, int64_t end);
)
