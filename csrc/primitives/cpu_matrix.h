// Small float matrices that fit the caches: products, a transposition, exp. Rows are `stride` floats apart; a
// row that is read or written as vectors has room for whole registers. Include from *_cpu.cpp files only (see
// cpu_isa.h).
#pragma once
#include "primitives/cpu_vector.h"

namespace vlk::VLK_ISA {

inline int64_t round_up(int64_t count, int64_t multiple) {
    return (count + multiple - 1) / multiple * multiple;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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

// The template of as many rows.
template <int most, int vectors>
inline void multiply_some(int64_t rows, Left left, Rows right, int64_t depth, float* out, int64_t stride,
                          bool add) {
    if constexpr (most > 0) {
        if (rows == most) return multiply_block<most, vectors>(left, right, depth, out, stride, add);
        multiply_some<most - 1, vectors>(rows, left, right, depth, out, stride, add);
    }
}

// A panel is as many registers of columns as a block of sums is wide; `vectors` is a constant.
template <int count>
struct Panel {
    static constexpr int vectors = count;
};

// work(column, panel) for all columns. A single register is slow, as its sums wait for themselves: where there
// is room for the sums of three, it joins the last panel.
template <typename Work>
inline void for_panels(int64_t columns, const Work& work) {
    constexpr int widest = lanes == 16 ? block_vectors + 1 : block_vectors;
    int64_t column = 0;
    for (; columns - column > widest * lanes; column += block_vectors * lanes) {
        work(column, Panel<block_vectors>{});
    }
    const int64_t rest = columns - column;
    if (rest > block_vectors * lanes) return work(column, Panel<widest>{});
    if (rest > lanes) return work(column, Panel<block_vectors>{});
    if (rest > 0) work(column, Panel<1>{});
}

// The last two blocks share their rows evenly: a block of one or two rows waits for its own sums.
inline int64_t rows_of_block(int64_t rows) {
    return rows >= 2 * block_rows ? block_rows : rows > block_rows ? (rows + 1) / 2 : rows;
}

template <int vectors, typename Between>
inline void multiply_columns(Left left, Rows right, int64_t rows, int64_t depth, float* out, int64_t stride,
                             bool add, const Between& between) {
    while (rows > 0) {
        const int64_t taken = rows_of_block(rows);
        multiply_some<block_rows, vectors>(taken, left, right, depth, out, stride, add);
        between();
        left.data += taken * left.row;
        out += taken * stride;
        rows -= taken;
    }
}

// out [rows, columns] = (out +) left [rows, depth] right [depth, columns], in whole registers of columns.
// between() is called after every block of registers.
template <typename Between>
inline void multiply(Left left, Rows right, int64_t rows, int64_t depth, int64_t columns, float* out,
                     int64_t stride, bool add, const Between& between) {
    for_panels(columns, [&](int64_t column, auto panel) {
        const Rows part{right.data + column, right.stride};
        multiply_columns<panel.vectors>(left, part, rows, depth, out + column, stride, add, between);
    });
}

inline void multiply(Left left, Rows right, int64_t rows, int64_t depth, int64_t columns, float* out,
                     int64_t stride) {
    multiply(left, right, rows, depth, columns, out, stride, false, [] {});
}

typedef float Four __attribute__((vector_size(16)));

// Four columns of four rows, turned: register c is column c. A wider register holds the columns of more rows,
// four to each of its groups.
inline void load_turned(const float* const* rows, int64_t column, Four (&turned)[4]) {
    Four in[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) in[r] = load_as<Four>(rows[r] + column);
    const Four a{in[0][0], in[1][0], in[0][1], in[1][1]}, b{in[2][0], in[3][0], in[2][1], in[3][1]};
    const Four c{in[0][2], in[1][2], in[0][3], in[1][3]}, d{in[2][2], in[3][2], in[2][3], in[3][3]};
    turned[0] = Four{a[0], a[1], b[0], b[1]};
    turned[1] = Four{a[2], a[3], b[2], b[3]};
    turned[2] = Four{c[0], c[1], d[0], d[1]};
    turned[3] = Four{c[2], c[3], d[2], d[3]};
}

#if defined(__AVX512F__)
inline void load_turned(const float* const* rows, int64_t column, Floats (&turned)[4]) {
    __m512 in[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
        const auto four = [&](int group) { return _mm_loadu_ps(rows[4 * group + r] + column); };
        const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(four(0)), four(1), 1);
        const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(four(2)), four(3), 1);
        in[r] = _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(_mm512_castps256_ps512(low)),
                                                    _mm256_castps_pd(high), 1));
    }
    const __m512 a = _mm512_unpacklo_ps(in[0], in[1]), b = _mm512_unpacklo_ps(in[2], in[3]);
    const __m512 c = _mm512_unpackhi_ps(in[0], in[1]), d = _mm512_unpackhi_ps(in[2], in[3]);
    turned[0] = cast_bits<Floats>(_mm512_shuffle_ps(a, b, 0x44));
    turned[1] = cast_bits<Floats>(_mm512_shuffle_ps(a, b, 0xee));
    turned[2] = cast_bits<Floats>(_mm512_shuffle_ps(c, d, 0x44));
    turned[3] = cast_bits<Floats>(_mm512_shuffle_ps(c, d, 0xee));
}
#elif defined(__AVX2__)
inline void load_turned(const float* const* rows, int64_t column, Floats (&turned)[4]) {
    __m256 in[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
        in[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[r] + column)),
                                     _mm_loadu_ps(rows[4 + r] + column), 1);
    }
    const __m256 a = _mm256_unpacklo_ps(in[0], in[1]), b = _mm256_unpacklo_ps(in[2], in[3]);
    const __m256 c = _mm256_unpackhi_ps(in[0], in[1]), d = _mm256_unpackhi_ps(in[2], in[3]);
    turned[0] = cast_bits<Floats>(_mm256_shuffle_ps(a, b, 0x44));
    turned[1] = cast_bits<Floats>(_mm256_shuffle_ps(a, b, 0xee));
    turned[2] = cast_bits<Floats>(_mm256_shuffle_ps(c, d, 0x44));
    turned[3] = cast_bits<Floats>(_mm256_shuffle_ps(c, d, 0xee));
}
#endif

// Columns of as many rows as Vector has lanes, from `row` on; rows past the end repeat the last one.
template <typename Vector>
inline void transpose_rows(Rows from, int64_t row, int64_t rows, int64_t columns, float* out, int64_t stride) {
    constexpr int64_t count = sizeof(Vector) / sizeof(float);
    const float* at[count];
    for (int64_t r = 0; r < count; ++r) {
        at[r] = from.data + (row + r < rows ? row + r : rows - 1) * from.stride;
    }
    for (int64_t column = 0; column < columns; column += 4) {
        Vector turned[4];
        load_turned(at, column, turned);
#pragma GCC unroll 4
        for (int64_t c = 0; c < 4; ++c) {
            std::memcpy(out + (column + c) * stride + row, &turned[c], sizeof(Vector));
        }
    }
}

// out[column][row] = from[row][column]. Rows past the end repeat the last one, up to `reach` of them
// (a multiple of 4); columns are rounded up to 4.
inline void transpose(Rows from, int64_t rows, int64_t columns, float* out, int64_t stride, int64_t reach) {
    int64_t row = 0;
    for (; row + lanes <= reach; row += lanes)
        transpose_rows<Floats>(from, row, rows, columns, out, stride);
    for (; row < reach; row += 4) transpose_rows<Four>(from, row, rows, columns, out, stride);
}

// What is left of exp to its instruction set: the nearest integer, and power * 2^whole, or 0 where `log2` is
// below -126 and the result would be subnormal.
#if defined(__AVX512F__)
[[gnu::always_inline]] inline Floats nearest(Floats x) {
    return cast_bits<Floats>(_mm512_maskz_roundscale_ps(all_lanes, cast_bits<__m512>(x), 0));
}
[[gnu::always_inline]] inline Floats scaled(Floats power, Floats whole, Floats log2) {
    const __mmask16 normal =
        _mm512_cmp_ps_mask(cast_bits<__m512>(log2), _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return cast_bits<Floats>(
        _mm512_maskz_scalef_ps(normal, cast_bits<__m512>(power), cast_bits<__m512>(whole)));
}
#else
constexpr float to_integers = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer
[[gnu::always_inline]] inline Floats nearest(Floats x) { return (x + to_integers) - to_integers; }
[[gnu::always_inline]] inline Floats scaled(Floats power, Floats whole, Floats log2) {
    const Words exponent = cast_bits<Words>(whole + to_integers) + (127u - 0x4b400000u);
    return log2 < -126.0f ? Floats{} : power * cast_bits<Floats>(exponent << 23);
}
#endif

// exp(x) for x <= 88, within 2 ulp for x rounded once more; 0 below -87.3. NaN stays NaN. Of the
// polynomials of degree 6 that are 1 at 0 this has the least largest relative error against 2^r, 2e-9.
[[gnu::always_inline]] inline Floats exponential(Floats x) {
    const Floats log2 = x * 1.44269504f;
    const Floats whole = nearest(log2);
    const Floats r = log2 - whole;
    Floats power = r * 1.535336196e-4f + 1.339887385e-3f;
    power = power * r + 9.618436918e-3f;
    power = power * r + 5.550332367e-2f;
    power = power * r + 2.402264774e-1f;
    power = power * r + 6.931471825e-1f;
    power = power * r + 1.0f;
    return scaled(power, whole, log2);
}

}  // namespace vlk::VLK_ISA
