#include "layer_norm/layer_norm_cpu.h"

#include "primitives/cpu_norm.h"

namespace vlk::VLK_ISA {
namespace {

// Asks for the row below this one: a row is worked on in passes, and memory would rest in all but the first.
template <typename T>
void fetch_ahead(const T* row, int64_t width) {
    __builtin_prefetch(row + width);
}

template <typename T, typename Chunk>
void store_result(T* to, Floats value, Chunk chunk, bool past_caches) {
    if (past_caches) {
        store_past_caches(to, value, chunk);
    } else {
        store(to, value, chunk);
    }
}

// Writes the row of z, rounded as it is stored, and returns the sum of what was written: y is the norm of
// exactly that z. `kept`, if any, is a second copy that nobody reads soon.
template <typename T>
float write_sum_row(const LayerNormForward& op, const float* linear_bias, const DropoutRow& dropped,
                    int64_t row, T* z, T* kept) {
    const T* x = static_cast<const T*>(op.x) + row * op.width;
    const T* residual = op.residual ? static_cast<const T*>(op.residual) + row * op.width : nullptr;
    const float scale = keep_scale(op.dropout) * (op.row_scale ? op.row_scale[row] : 1.0f);
    RowSum sum;
    for_chunks(op.width, [&](int64_t column, auto chunk, int k) {
        Floats value = load(x + column, chunk);
        if (linear_bias) value += load(linear_bias + column, chunk);
        if (op.dropout.threshold) value = dropped.apply(value, column);
        if (scale != 1.0f) value *= scale;
        if (residual) value += load(residual + column, chunk);
        sum.partial[k] += store(z + column, value, chunk);
        if (kept) store_past_caches(kept + column, value, chunk);
    });
    return sum.total();
}

template <typename T>
void forward_rows(const LayerNormForward& op, int64_t first_row, int64_t last_row) {
    const FloatParameter weight(op.weight, op.width), bias(op.bias, op.width),
        linear_bias(op.linear_bias, op.width);
    DropoutRow dropped(op.dropout, op.width);
    const bool fused = is_fused(op);
    const bool in_place = op.z && !op.past_caches;
    Scratch<T> apart(fused && !in_place ? op.width : 0);
    for (int64_t row = first_row; row < last_row; ++row) {
        const T* x = static_cast<const T*>(op.x) + row * op.width;
        const T* residual = op.residual ? static_cast<const T*>(op.residual) + row * op.width : x;
        const T* z = x;
        float sum = 0.0f;
        if (fused) {
            if (op.dropout.threshold) dropped.draw(row);
            T* kept = op.z ? static_cast<T*>(op.z) + row * op.width : nullptr;
            T* written = in_place ? kept : apart.get();
            sum = write_sum_row(op, linear_bias.get(), dropped, row, written, in_place ? nullptr : kept);
            z = written;
        } else if (op.mean) {
            sum = row_sum(z, op.width);
        }
        const Moments m = op.mean ? moments(z, sum, op.width, op.eps) : root_mean_square(z, op.width, op.eps);
        if (op.mean) op.mean[row] = m.mean;
        op.rstd[row] = m.rstd;
        T* y = static_cast<T*>(op.y) + row * op.width;
        for_chunks(op.width, [&](int64_t column, auto chunk, int) {
            const Floats value = normalised(load(z + column, chunk), m, weight.get(), bias.get(), column, chunk);
            store_result(y + column, value, chunk, op.past_caches);
            fetch_ahead(x + column, op.width);
            fetch_ahead(residual + column, op.width);
        });
    }
    if (op.past_caches) finish_streams();
}

Moments moments_of(const LayerNormBackward& op, int64_t row) {
    return {op.mean ? op.mean[row] : 0.0f, op.rstd[row]};
}

// Writes the rows of dz and dx; adds dx to the partial row of dlinear_bias.
template <typename T>
void write_gradient_row(const LayerNormBackward& op, const float* weight, const DropoutRow& dropped,
                        int64_t row, Projection p, float* dlinear_bias) {
    const int64_t start = row * op.width;
    const T* dy = static_cast<const T*>(op.dy) + start;
    const T* z = static_cast<const T*>(op.z) + start;
    const T* dsum = op.dsum ? static_cast<const T*>(op.dsum) + start : nullptr;
    T* dz = static_cast<T*>(op.dz) + start;
    T* dx = op.dx ? static_cast<T*>(op.dx) + start : nullptr;
    const Moments m = moments_of(op, row);
    const float scale = keep_scale(op.dropout) * (op.row_scale ? op.row_scale[row] : 1.0f);
    for_chunks(op.width, [&](int64_t column, auto chunk, int) {
        Floats gradient =
            norm_gradient(load(dy + column, chunk), load(z + column, chunk), m, p, weight, column, chunk);
        if (dsum) gradient += load(dsum + column, chunk);
        store_result(dz + column, gradient, chunk, op.past_caches);
        if (dx) {
            if (op.dropout.threshold) gradient = dropped.apply(gradient, column);
            gradient *= scale;
            store_result(dx + column, gradient, chunk, op.past_caches);
        }
        if (op.sum_dx) store(dlinear_bias + column, load(dlinear_bias + column, chunk) + gradient, chunk);
        fetch_ahead(dy + column, op.width);
        fetch_ahead(z + column, op.width);
    });
}

template <typename T>
void backward_chunks(const LayerNormBackward& op, int64_t first_chunk, int64_t last_chunk) {
    const FloatParameter weight(op.weight, op.width);
    DropoutRow dropped(op.dropout, op.width);
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
        float* dweight = op.partials + chunk * 3 * op.width;
        float* dbias = dweight + op.width;
        float* dlinear_bias = dbias + op.width;
        std::memset(dweight, 0, 3 * op.width * sizeof(float));
        const int64_t last_row = chunk_start(chunk + 1, op.num_chunks, op.rows);
        for (int64_t row = chunk_start(chunk, op.num_chunks, op.rows); row < last_row; ++row) {
            const Moments m = moments_of(op, row);
            const T* dy = static_cast<const T*>(op.dy) + row * op.width;
            const T* z = static_cast<const T*>(op.z) + row * op.width;
            Projection p = project(dy, z, m, weight.get(), dweight, dbias, op.width);
            if (!op.mean) p.gradient = 0.0f;
            if (op.dropout.threshold) dropped.draw(row);
            write_gradient_row<T>(op, weight.get(), dropped, row, p, dlinear_bias);
        }
    }
    if (op.past_caches) finish_streams();
}

}  // namespace

void layer_norm_forward(const LayerNormForward& op, int64_t first_row, int64_t last_row) {
    visit(op.dtype, [&](auto element) { forward_rows<decltype(element)>(op, first_row, last_row); });
}

void layer_norm_backward(const LayerNormBackward& op, int64_t first_chunk, int64_t last_chunk) {
    visit(op.dtype, [&](auto element) { backward_chunks<decltype(element)>(op, first_chunk, last_chunk); });
}

}  // namespace vlk::VLK_ISA
