// Packing is two loops over rows: every target row is a copy of one source row, or a sum of several; never written twice.
// The binding lists the source rows as addresses, so these loops know nothing of layouts, positions or dtypes they do not add up.
#pragma once
#include <cstdint>

#include "primitives/cpu_isa.h"
#include "primitives/dtype.h"

VLK_DECLARE_CPU(
    // Target rows [begin, end): the `row_bytes` bytes at sources[row], zeros where that is null. `through`: past the caches, for a target
    // that would not stay there; then target and row_bytes must be multiples of 16.
    void copy_rows(const char* const* sources, int64_t row_bytes, char* target, int64_t begin, int64_t end, bool through);

    // Target rows [begin, end): the sum, in float and in this order, of the rows at sources[first[row]] .. sources[first[row + 1] - 1],
    // divided by divisors[row] where divisors are given; zeros for an empty sum. A row has `width` elements.
    void sum_rows(vlk::Dtype dtype, const char* const* sources, const int64_t* first, const float* divisors, int64_t width,
                  char* target, int64_t begin, int64_t end);
)
