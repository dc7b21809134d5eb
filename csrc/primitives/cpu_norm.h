// The row code LayerNorm kernels share: moments, normalisation, its gradient, dropout bytes, column sums of
// the partial rows. Include from *_cpu.cpp files only (see cpu_isa.h).
#pragma once
#include "primitives/cpu_vector.h"
#include "primitives/norm.h"
#include "primitives/philox.h"

namespace vlk::VLK_ISA {

struct Moments {
    float mean, rstd;
};

// A parameter as floats: its own memory when it is float32 already, a converted copy otherwise, null when
// absent.
class FloatParameter {
  public:
    FloatParameter(Parameter parameter, int64_t width) : copy_(needs_copy(parameter) ? width : 0) {
        values_ = static_cast<const float*>(parameter.data);
        if (!needs_copy(parameter)) return;
        values_ = copy_.get();
        visit(parameter.dtype, [&](auto element) {
            const auto* from = static_cast<const decltype(element)*>(parameter.data);
            for (int64_t column = 0; column < width; ++column) copy_.get()[column] = to_float(from[column]);
        });
    }
    const float* get() const { return values_; }

  private:
    static bool needs_copy(Parameter parameter) {
        return parameter.data && parameter.dtype != Dtype::float32;
    }
    Scratch<float> copy_;
    const float* values_;
};

// The dropout decisions of one row: a byte per column, drawn sixteen columns at a time, many draws side by
// side.
class DropoutRow {
  public:
    DropoutRow(const Dropout& dropout, int64_t width)
        : dropout_(dropout),
          groups_((width + columns_per_draw - 1) / columns_per_draw),
          bytes_(dropout.threshold ? groups_ * columns_per_draw : 0) {
        if (dropout.threshold) key_ = philox_key(dropout.state);
    }

    void draw(int64_t row) {
        uint32_t* words = reinterpret_cast<uint32_t*>(bytes_.get());
        const PhiloxWords first = row_counter(dropout_, row);
        const PhiloxKey key = key_;
        const int groups = static_cast<int>(groups_);
#pragma omp simd
        for (int group = 0; group < groups; ++group) {
            const PhiloxWords drawn = philox({static_cast<uint32_t>(group), first.y, first.z, first.w}, key);
            words[4 * group] = drawn.x;
            words[4 * group + 1] = drawn.y;
            words[4 * group + 2] = drawn.z;
            words[4 * group + 3] = drawn.w;
        }
    }

    Floats apply(Floats value, int64_t column) const {
        const Ints drawn = cast_bits<Ints>(widen(load_as<Bytes>(bytes_.get() + column)));
        return drawn >= dropout_.threshold ? value : Floats{};
    }

  private:
    const Dropout dropout_;
    PhiloxKey key_{};
    int64_t groups_;
    Scratch<uint8_t> bytes_;
};

template <typename T>
inline float row_sum(const T* row, int64_t width) {
    RowSum sum;
    for_chunks(width,
               [&](int64_t column, auto chunk, int k) { sum.partial[k] += load(row + column, chunk); });
    return sum.total();
}

// Two passes: the squares are of differences from the mean, so a large mean costs no accuracy.
template <typename T>
inline Moments moments(const T* row, float sum, int64_t width, float eps) {
    const float mean = sum / static_cast<float>(width);
    RowSum squares;
    for_chunks(width, [&](int64_t column, auto chunk, int k) {
        const Floats centred = zero_past_end(load(row + column, chunk) - mean, chunk);
        squares.partial[k] += centred * centred;
    });
    return {mean, 1.0f / __builtin_sqrtf(squares.total() / static_cast<float>(width) + eps)};
}

// What stands for the moments of a row that is not centered.
template <typename T>
inline Moments root_mean_square(const T* row, int64_t width, float eps) {
    RowSum squares;
    for_chunks(width, [&](int64_t column, auto chunk, int k) {
        const Floats value = load(row + column, chunk);
        squares.partial[k] += value * value;
    });
    return {0.0f, 1.0f / __builtin_sqrtf(squares.total() / static_cast<float>(width) + eps)};
}

// (z - mean) * rstd * weight + bias of one chunk; weight and bias may be null.
template <typename Chunk>
inline Floats normalised(Floats z, Moments m, const float* weight, const float* bias, int64_t column,
                         Chunk chunk) {
    Floats y = (z - m.mean) * m.rstd;
    if (weight) y *= load(weight + column, chunk);
    if (bias) y += load(bias + column, chunk);
    return y;
}

// The two row means the gradient of a LayerNorm needs; adds the row's share to the partial rows of dweight
// and dbias.
struct Projection {
    float gradient, slope;
};  // mean(g) and mean(g * xhat) of g = dy * weight

template <typename G, typename Z>
inline Projection project(const G* dy, const Z* z, Moments m, const float* weight, float* dweight,
                          float* dbias, int64_t width) {
    RowSum gradient, slope;
    for_chunks(width, [&](int64_t column, auto chunk, int k) {
        const Floats upstream = load(dy + column, chunk);
        const Floats xhat = (load(z + column, chunk) - m.mean) * m.rstd;
        store(dweight + column, load(dweight + column, chunk) + upstream * xhat, chunk);
        store(dbias + column, load(dbias + column, chunk) + upstream, chunk);
        const Floats g = weight ? upstream * load(weight + column, chunk) : upstream;
        gradient.partial[k] += g;
        slope.partial[k] += g * xhat;
    });
    return {gradient.total() / static_cast<float>(width), slope.total() / static_cast<float>(width)};
}

// The gradient of one chunk of z.
template <typename Chunk>
inline Floats norm_gradient(Floats dy, Floats z, Moments m, Projection p, const float* weight, int64_t column,
                            Chunk chunk) {
    const Floats g = weight ? dy * load(weight + column, chunk) : dy;
    const Floats xhat = (z - m.mean) * m.rstd;
    return (g - p.gradient - xhat * p.slope) * m.rstd;
}

}  // namespace vlk::VLK_ISA
