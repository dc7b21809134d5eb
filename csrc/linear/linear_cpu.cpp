// The product of Goto and van de Geijn ("Anatomy of high-performance matrix multiplication", 2008): tiles of
// the result stay in registers; the rows of a tile come from the first cache, its columns from the second.
// Both are packed beforehand in the order the tiles read them, so either orientation of a factor costs alike.
#include "linear/linear_cpu.h"

#include "primitives/cpu_matrix.h"

namespace vlk::VLK_ISA {
namespace {

constexpr int64_t tile_rows = block_rows;
constexpr int64_t tile_columns = block_vectors * lanes;
static_assert(strip_rows % tile_rows == 0 && strip_columns % tile_columns == 0, "strips hold whole tiles");

constexpr int64_t depth_block = 384;            // a left panel fills a third of the first cache,
constexpr int64_t column_block = 512;           // and these columns most of the second
constexpr int64_t row_block = 11 * strip_rows;  // packed at once
constexpr int64_t steps_ahead = 8;              // of the right panel

// out[k * width + i] = from[i * line + k * step] for `lines` <= width lines. Lines past the end are anything.
template <int64_t width>
void pack_panel(const float* from, int64_t line, int64_t step, int64_t lines, int64_t depth, float* out) {
    if (line == 1 && lines == width) {
        for (int64_t k = 0; k < depth; ++k) {
            std::memcpy(out + k * width, from + k * step, width * sizeof(float));
        }
        return;
    }
    int64_t packed = 0;
    if constexpr (width % 4 == 0) {
        if (step == 1) packed = depth / 4 * 4;
        if (packed) transpose({from, line}, lines, packed, out, width, width);
    }
    for (int64_t k = packed; k < depth; ++k) {
        for (int64_t i = 0; i < width; ++i) out[k * width + i] = i < lines ? from[i * line + k * step] : 0.0f;
    }
}

// A tile of out = `start` + left panel times right panel. Rows of `start` are `start_stride` apart; null: 0.
template <int rows>
void multiply_tile(const float* left, const float* right, int64_t depth, const float* start,
                   int64_t start_stride, float* out, int64_t stride) {
    Floats sum[rows][block_vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < block_vectors; ++v) {
            __builtin_prefetch(out + r * stride + v * lanes, 1);
            sum[r][v] = start ? load(start + r * start_stride + v * lanes, Whole{}) : Floats{};
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        Floats factor[block_vectors];
#pragma GCC unroll 8
        for (int v = 0; v < block_vectors; ++v) {
            __builtin_prefetch(right + steps_ahead * tile_columns + v * lanes);
            factor[v] = load(right + v * lanes, Whole{});
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < block_vectors; ++v) sum[r][v] += left[r] * factor[v];
        }
        left += tile_rows;
        right += tile_columns;
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < block_vectors; ++v) store(out + r * stride + v * lanes, sum[r][v], Whole{});
    }
}

template <int most>
void multiply_some(int64_t rows, const float* left, const float* right, int64_t depth, const float* start,
                   int64_t start_stride, float* out, int64_t stride) {
    if constexpr (most > 0) {
        if (rows == most) return multiply_tile<most>(left, right, depth, start, start_stride, out, stride);
        multiply_some<most - 1>(rows, left, right, depth, start, start_stride, out, stride);
    }
}

void copy_rows(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
               int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(to + r * stride, from + r * from_stride, columns * sizeof(float));
    }
}

// The last columns of `out` fill no registers: they are computed aside.
void multiply_last_columns(int64_t rows, int64_t columns, const float* left, const float* right, int64_t depth,
                           const float* start, int64_t start_stride, float* out, int64_t stride) {
    float aside[tile_rows * tile_columns] = {};
    if (start) copy_rows(start, start_stride, rows, columns, aside, tile_columns);
    multiply_some<tile_rows>(rows, left, right, depth, aside, tile_columns, aside, tile_columns);
    copy_rows(aside, tile_columns, rows, columns, out, stride);
}

// Adds depth [k, k + depth) of the product to the tiles at rows [row, row + rows), columns [first, last).
void multiply_row_of_tiles(const Product& op, int64_t row, int64_t rows, const float* left, int64_t k,
                           int64_t depth, int64_t first, int64_t last) {
    const float* block = op.packed + k * round_up(op.columns, strip_columns);
    for (int64_t column = first; column < last; column += tile_columns) {
        const float* right = block + column * depth;
        float* out = op.out + row * op.columns + column;
        const float* bias = op.bias ? op.bias + column : nullptr;
        const float* start = k || op.add ? out : bias;
        const int64_t start_stride = start == out ? op.columns : 0;
        if (column + tile_columns <= op.columns) {
            multiply_some<tile_rows>(rows, left, right, depth, start, start_stride, out, op.columns);
        } else {
            multiply_last_columns(rows, op.columns - column, left, right, depth, start, start_stride, out,
                                  op.columns);
        }
    }
}

// `panels` holds the packed rows [first, last) of left, depth [k, k + depth).
void multiply_panels(const Product& op, int64_t first, int64_t last, int64_t k, int64_t depth,
                    const float* panels) {
    for (int64_t column = 0; column < op.columns; column += column_block) {
        const int64_t end = smaller(column + column_block, op.columns);
        for (int64_t row = first; row < last; row += tile_rows) {
            const float* left = panels + (row - first) * depth;
            multiply_row_of_tiles(op, row, smaller(tile_rows, last - row), left, k, depth, column, end);
        }
    }
}

}  // namespace

void pack_right(const Product& op, int64_t first_strip, int64_t last_strip) {
    const int64_t columns = round_up(op.columns, strip_columns);
    const int64_t last = smaller(last_strip * strip_columns, op.columns);
    for (int64_t k = 0; k < op.depth; k += depth_block) {
        const int64_t depth = smaller(depth_block, op.depth - k);
        for (int64_t column = first_strip * strip_columns; column < last; column += tile_columns) {
            const float* from = op.right.data + k * op.right.row + column * op.right.column;
            pack_panel<tile_columns>(from, op.right.column, op.right.row,
                                     smaller(tile_columns, op.columns - column), depth,
                                     op.packed + k * columns + column * depth);
        }
    }
}

void multiply_rows(const Product& op, int64_t first_strip, int64_t last_strip) {
    const int64_t end = smaller(last_strip * strip_rows, op.rows);
    Scratch<float> panels(row_block * depth_block);
    for (int64_t first = first_strip * strip_rows; first < end; first += row_block) {
        const int64_t last = smaller(first + row_block, end);
        for (int64_t k = 0; k == 0 || k < op.depth; k += depth_block) {  // no depth: zeros, or the bias
            const int64_t depth = smaller(depth_block, op.depth - k);
            for (int64_t row = first; row < last; row += tile_rows) {
                pack_panel<tile_rows>(op.left.data + row * op.left.row + k * op.left.column, op.left.row,
                                      op.left.column, smaller(tile_rows, last - row), depth,
                                      panels.get() + (row - first) * depth);
            }
            multiply_panels(op, first, last, k, depth, panels.get());
        }
    }
}

}  // namespace vlk::VLK_ISA
