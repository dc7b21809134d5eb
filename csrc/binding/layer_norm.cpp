#include "layer_norm/layer_norm_cpu.h"

#include "binding/norm.h"

namespace vlk {
namespace {

// A tensor larger than the caches can be written past them.
bool can_stream(const Tensor& tensor) {
    constexpr int64_t larger_than_caches = 16 << 20;
    return rows_fill_cache_lines(tensor) &&
           tensor.numel() * static_cast<int64_t>(tensor.element_size()) >= larger_than_caches;
}

int64_t width_of(const Tensor& x) { return x.size(x.dim() - 1); }

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& residual,
                                                   const OptionalTensor& linear_bias,
                                                   const OptionalTensor& row_scale,
                                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                                   const OptionalTensor& rng_state,
                                                   const OptionalTensor& keys, int64_t stream,
                                                   int64_t threshold, double eps, bool keep_sum) {
    check_contiguous(x, "x");
    const int64_t width = width_of(x), rows = width ? x.numel() / width : 0;
    LayerNormForward op{};
    op.dtype = dtype_of(x, "x");
    op.width = width;
    op.rows = rows;
    op.eps = static_cast<float>(eps);
    op.x = x.const_data_ptr();
    op.residual = data_like(residual, x, "residual");
    op.linear_bias = parameter(linear_bias, width, "linear_bias");
    op.weight = parameter(weight, width, "weight");
    op.bias = parameter(bias, width, "bias");
    op.row_scale = row_scale ? row_statistics(*row_scale, rows, "row_scale") : nullptr;
    op.dropout = dropout_of(rng_state, keys, stream, threshold, rows);

    Tensor y = torch::stable::empty_like(x);
    Tensor z = is_fused(op) && keep_sum ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
    Tensor mean = new_float(x, {rows}), rstd = new_float(x, {rows});
    op.y = y.mutable_data_ptr();
    op.z = is_fused(op) && keep_sum ? z.mutable_data_ptr() : nullptr;
    op.stream_z = op.z && can_stream(z);
    op.mean = static_cast<float*>(mean.mutable_data_ptr());
    op.rstd = static_cast<float*>(rstd.mutable_data_ptr());
    parallel_rows(rows, 16 * width, [&, kernel = VLK_CPU(layer_norm_forward)](int64_t begin, int64_t end) {
        kernel(op, begin, end);
    });
    return {y, z, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const OptionalTensor& dsum, const Tensor& z, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& linear_bias, const OptionalTensor& row_scale, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& rng_state, const OptionalTensor& keys, int64_t stream,
    int64_t threshold) {
    check_contiguous(z, "z");
    const int64_t width = width_of(z), rows = width ? z.numel() / width : 0;
    const PartialRows partials(z, rows, 3, width);
    LayerNormBackward op{};
    op.dtype = dtype_of(z, "z");
    op.width = width;
    op.rows = rows;
    op.num_chunks = partials.chunks;
    op.dy = data_like(dy, z, "dy");
    op.dsum = data_like(dsum, z, "dsum");
    op.z = z.const_data_ptr();
    op.mean = row_statistics(mean, rows, "mean");
    op.rstd = row_statistics(rstd, rows, "rstd");
    op.weight = parameter(weight, width, "weight");
    op.row_scale = row_scale ? row_statistics(*row_scale, rows, "row_scale") : nullptr;
    op.dropout = dropout_of(rng_state, keys, stream, threshold, rows);
    op.partials = partials.data();
    op.sum_dx = linear_bias.has_value();

    const bool dx_differs = op.row_scale || op.dropout.threshold;
    Tensor dz = torch::stable::empty_like(z);
    Tensor dx = dx_differs ? torch::stable::empty_like(z) : torch::stable::new_empty(z, {0});
    op.dz = dz.mutable_data_ptr();
    op.dx = dx_differs ? dx.mutable_data_ptr() : nullptr;
    const int64_t chunk_bytes = 16 * width * std::max<int64_t>(1, rows / partials.chunks);
    parallel_rows(
        partials.chunks, chunk_bytes,
        [&, kernel = VLK_CPU(layer_norm_backward)](int64_t begin, int64_t end) { kernel(op, begin, end); });
    return {dz, dx, partials.sum(0, weight), partials.sum(1, bias), partials.sum(2, linear_bias)};
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels, CPU, m) {
    m.impl("layer_norm_forward", TORCH_BOX(&forward));
    m.impl("layer_norm_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace vlk
