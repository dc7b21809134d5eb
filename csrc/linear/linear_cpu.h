#pragma once
#include <cstdint>

#include "primitives/cpu_isa.h"

namespace vlk {

// Element (i, j) is data[i * row + j * column].
struct Matrix {
    const float* data;
    int64_t row, column;
};

// out [rows, columns] = (out +) left [rows, depth] right [depth, columns] + bias, all float32; no bias with `add`.
struct Product {
    int64_t rows, depth, columns;
    Matrix left, right;
    const float* bias;  // null: none
    bool add;
    float* packed;      // [depth, columns rounded up to strips]: right as the tiles read it
    float* out;         // rows are `columns` floats apart
};

// What threads share out: as many rows and columns as hold whole tiles of every instruction set.
constexpr int64_t strip_rows = 24;
constexpr int64_t strip_columns = 32;

}  // namespace vlk

// First all of the right factor is packed, then rows are multiplied. An element is the same sum in the same
// order whatever the strips.
VLK_DECLARE_CPU(
    void pack_right(const vlk::Product& op, int64_t first_strip, int64_t last_strip);
    void multiply_rows(const vlk::Product& op, int64_t first_strip, int64_t last_strip);
)
