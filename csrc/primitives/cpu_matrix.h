// Small float matrices that fit the caches: products, a transposition, exp. Rows are `stride` floats apart; a
// row that is read or written as vectors has room for whole registers. Include from *_cpu.cpp files only (see
// cpu_isa.h).
#pragma once
#include "primitives/cpu_vector.h"

namespace vlk::VLK_ISA {

inline int64_t round_up(int64_t count, int64_t multiple) {
    return (count + multiple - 1) / multiple * multiple;
}

struct Rows {
    const float* data;
    int64_t stride;
};

// Element (m, k) of a left factor is data[m * row + k * depth]: either orientation, read one by one.
struct Left {
    const float* data;
    int64_t row, depth;
};

inline Left as_left(Rows rows) { return {rows.data, rows.stride, 1}; }
inline Left transposed(Rows rows) { return {rows.data, 1, rows.stride}; }

// As many sums as the registers hold beside the factors.
constexpr int block_rows = lanes == 16 ? 8 : 6;
constexpr int block_vectors = 2;

template <int rows, int vectors>
inline void multiply_block(Left left, Rows right, int64_t depth, float* out, int64_t stride, bool add) {
    Floats sum[rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            sum[r][v] = add ? load(out + r * stride + v * lanes, Whole{}) : Floats{};
    }
    for (int64_t k = 0; k < depth; ++k) {
        Floats factor[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            factor[v] = load(right.data + k * right.stride + v * lanes, Whole{});
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const float scalar = left.data[r * left.row + k * left.depth];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) sum[r][v] += scalar * factor[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) store(out + r * stride + v * lanes, sum[r][v], Whole{});
    }
}

// The last `rows` <= most rows of a block column: the smallest template that fits.
template <int most, int vectors>
inline void multiply_rest(int64_t rows, Left left, Rows right, int64_t depth, float* out, int64_t stride,
                          bool add) {
    if constexpr (most > 0) {
        if (rows == most) return multiply_block<most, vectors>(left, right, depth, out, stride, add);
        multiply_rest<most - 1, vectors>(rows, left, right, depth, out, stride, add);
    }
}

template <int vectors>
inline void multiply_columns(Left left, Rows right, int64_t rows, int64_t depth, float* out, int64_t stride,
                             bool add) {
    for (; rows >= block_rows; rows -= block_rows) {
        multiply_block<block_rows, vectors>(left, right, depth, out, stride, add);
        left.data += block_rows * left.row;
        out += block_rows * stride;
    }
    multiply_rest<block_rows - 1, vectors>(rows, left, right, depth, out, stride, add);
}

// out [rows, columns] = (out +) left [rows, depth] right [depth, columns], in whole registers of columns.
inline void multiply(Left left, Rows right, int64_t rows, int64_t depth, int64_t columns, float* out,
                     int64_t stride, bool add = false) {
    int64_t column = 0;
    for (; column + lanes < columns; column += block_vectors * lanes) {
        const Rows part{right.data + column, right.stride};
        multiply_columns<block_vectors>(left, part, rows, depth, out + column, stride, add);
    }
    const Rows part{right.data + column, right.stride};
    if (column < columns) multiply_columns<1>(left, part, rows, depth, out + column, stride, add);
}

typedef float Four __attribute__((vector_size(16)));

// out[column][row] = factor * from[row][column] in blocks of 4 x 4. Rows past the end repeat the last one, up
// to `stride` of them (a multiple of 4); columns are rounded up to 4.
inline void transpose(Rows from, int64_t rows, int64_t columns, float factor, float* out, int64_t stride) {
    for (int64_t column = 0; column < columns; column += 4) {
        for (int64_t row = 0; row < stride; row += 4) {
            Four in[4];
#pragma GCC unroll 4
            for (int64_t r = 0; r < 4; ++r) {
                const int64_t source = row + r < rows ? row + r : rows - 1;
                in[r] = factor * load_as<Four>(from.data + source * from.stride + column);
            }
            const Four a{in[0][0], in[1][0], in[0][1], in[1][1]}, b{in[2][0], in[3][0], in[2][1], in[3][1]};
            const Four c{in[0][2], in[1][2], in[0][3], in[1][3]}, d{in[2][2], in[3][2], in[2][3], in[3][3]};
            const Four turned[4] = {{a[0], a[1], b[0], b[1]},
                                    {a[2], a[3], b[2], b[3]},
                                    {c[0], c[1], d[0], d[1]},
                                    {c[2], c[3], d[2], d[3]}};
            for (int64_t r = 0; r < 4; ++r)
                std::memcpy(out + (column + r) * stride + row, &turned[r], sizeof(Four));
        }
    }
}

// exp(x) for x <= 88, within 2 ulp; 0 below -87.3, where the result would be subnormal. NaN stays NaN.
// x = n log 2 + r with |r| <= log(2) / 2; the polynomial is that of Cephes' expf (Moshier, 1989).
inline Floats exponential(Floats x) {
    constexpr float shift = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer
    const Floats shifted = x * 1.44269504f + shift;
    const Floats n = shifted - shift;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Words exponent = cast_bits<Words>(shifted) + (127u - 0x4b400000u);
    const Floats power = cast_bits<Floats>(exponent << 23);
    return x < -87.3f ? Floats{} : p * power;
}

}  // namespace vlk::VLK_ISA
