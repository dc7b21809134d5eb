#include "layer_norm/layer_norm_cpu.h"

#include <array>

#include "binding/norm.h"
#include "layer_norm/layer_norm_plan.h"

#ifdef VLK_WITH_CUDA
#include "binding/cuda.h"
#include "layer_norm/layer_norm_cuda.h"
#endif

namespace vlk {
namespace {

// Outputs like `data` are written past the caches where they would not stay there, if their rows are whole cache lines.
bool pass_caches(const Tensor& data, std::initializer_list<const void*> outputs) {
    constexpr int64_t larger_than_caches = 16 << 20, line = 64;
    const int64_t element = static_cast<int64_t>(data.element_size());
    if (data.numel() * element < larger_than_caches || data.size(data.dim() - 1) * element % line) return false;
    return std::all_of(outputs.begin(), outputs.end(),
                       [](const void* output) { return reinterpret_cast<uintptr_t>(output) % line == 0; });
}

int64_t width_of(const Tensor& x) { return x.size(x.dim() - 1); }

// Rows without columns are rows too.
int64_t rows_of(const Tensor& x) {
    int64_t rows = 1;
    for (int64_t dim = 0; dim < x.dim() - 1; ++dim) rows *= x.size(dim);
    return rows;
}

void check_bias(bool centered, const OptionalTensor& bias) {
    STD_TORCH_CHECK(centered || !bias, "a norm that is not centered has no bias");
}

// The gradients of weight, bias and linear_bias; empty where there is no such parameter.
using ParameterGradients = std::array<Tensor, 3>;
using Parameters = std::array<OptionalTensor, 3>;

void forward_on_cpu(LayerNormForward& op, const Tensor& x) {
    op.past_caches = pass_caches(x, {op.y, op.z});
    parallel_rows(op.rows, 16 * op.width,
                  [&, kernel = VLK_CPU(layer_norm_forward)](int64_t begin, int64_t end) { kernel(op, begin, end); });
}

ParameterGradients backward_on_cpu(LayerNormBackward& op, const Tensor& z, const Parameters& parameters) {
    const ChunkSums sums(z, op.rows, 3, op.width);
    op.past_caches = pass_caches(z, {op.dz, op.dx});
    op.num_chunks = sums.chunks;
    op.partials = sums.data();
    const int64_t chunk_bytes = 16 * op.width * std::max<int64_t>(1, op.rows / sums.chunks);
    parallel_rows(
        sums.chunks, chunk_bytes,
        [&, kernel = VLK_CPU(layer_norm_backward)](int64_t begin, int64_t end) { kernel(op, begin, end); });
    return {sums.sum(0, parameters[0]), sums.sum(1, parameters[1]), sums.sum(2, parameters[2])};
}

#ifdef VLK_WITH_CUDA
void check_served(Dtype data, int64_t width, std::initializer_list<Parameter> parameters) {
    STD_TORCH_CHECK(width <= widest_row, "rows must have at most ", widest_row, " columns, got ", width);
    for (const Parameter& parameter : parameters)
        STD_TORCH_CHECK(!parameter.data || parameter.dtype == Dtype::float32 || parameter.dtype == data,
                        "parameters must have the dtype of the data or float32");
}

void forward_on_cuda(LayerNormForward& op, const Tensor& x) {
    check_served(op.dtype, op.width, {op.linear_bias, op.weight, op.bias});
    const OnDeviceOf device(x);
    check_launch(layer_norm_forward_cuda(op, device.stream()), "layer_norm_forward");
}

ParameterGradients backward_on_cuda(LayerNormBackward& op, const Tensor& z, const Parameters& parameters) {
    check_served(op.dtype, op.width, {op.weight});
    op.num_chunks = plan_backward(op).blocks;
    const Tensor partials = new_float(z, {op.num_chunks, 3, op.width});
    op.partials = static_cast<float*>(partials.mutable_data_ptr());
    PartialRows<3> sums{op.partials, op.num_chunks, op.width, {}};
    ParameterGradients gradients{no_tensor(partials), no_tensor(partials), no_tensor(partials)};
    for (int part = 0; part < 3; ++part) {
        if (!parameters[part]) continue;
        check_numel(*parameters[part], op.width, "parameter");
        gradients[part] = new_like(*parameters[part]);
        check_contiguous(gradients[part], "parameter");
        sums.gradients[part] = {gradients[part].mutable_data_ptr(), dtype_of(gradients[part], "parameter")};
    }
    const OnDeviceOf device(z);
    check_launch(layer_norm_backward_cuda(op, sums, device.stream()), "layer_norm_backward");
    return gradients;
}
#endif

template <auto run>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& residual,
                                                   const OptionalTensor& linear_bias,
                                                   const OptionalTensor& row_scale,
                                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                                   const OptionalTensor& rng_state,
                                                   const OptionalTensor& keys, int64_t stream,
                                                   int64_t threshold, double eps, bool keep_sum,
                                                   bool centered) {
    check_same_device(x, {residual, linear_bias, row_scale, weight, bias, rng_state, keys});
    check_contiguous(x, "x");
    check_bias(centered, bias);
    const int64_t width = width_of(x), rows = rows_of(x);
    LayerNormForward op{};
    op.dtype = dtype_of(x, "x");
    op.width = width;
    op.rows = width ? rows : 0;
    op.eps = static_cast<float>(eps);
    op.x = x.const_data_ptr();
    op.residual = data_like(residual, x, "residual");
    op.linear_bias = parameter(linear_bias, width, "linear_bias");
    op.weight = parameter(weight, width, "weight");
    op.bias = parameter(bias, width, "bias");
    op.row_scale = row_scale ? row_statistics(*row_scale, rows, "row_scale") : nullptr;
    op.dropout = dropout_of(rng_state, keys, stream, threshold, rows);

    // Not is_fused(op): a tensor without elements has no address.
    const bool kept = keep_sum && (residual || linear_bias || row_scale || op.dropout.threshold);
    Tensor y = new_like(x);
    Tensor z = kept ? new_like(x) : no_tensor(x);
    Tensor mean = new_float(x, {centered ? rows : 0}), rstd = new_float(x, {rows});
    op.y = y.mutable_data_ptr();
    op.z = kept ? z.mutable_data_ptr() : nullptr;
    op.mean = centered ? static_cast<float*>(mean.mutable_data_ptr()) : nullptr;
    op.rstd = static_cast<float*>(rstd.mutable_data_ptr());
    run(op, x);
    return {y, z, mean, rstd};
}

template <auto run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const OptionalTensor& dsum, const Tensor& z, const OptionalTensor& mean, const Tensor& rstd,
    const OptionalTensor& linear_bias, const OptionalTensor& row_scale, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& rng_state, const OptionalTensor& keys, int64_t stream,
    int64_t threshold) {
    check_same_device(z, {dy, dsum, mean, rstd, linear_bias, row_scale, weight, bias, rng_state, keys});
    check_contiguous(z, "z");
    check_bias(mean.has_value(), bias);
    const int64_t width = width_of(z), rows = rows_of(z);
    LayerNormBackward op{};
    op.dtype = dtype_of(z, "z");
    op.width = width;
    op.rows = width ? rows : 0;
    op.dy = data_like(dy, z, "dy");
    op.dsum = data_like(dsum, z, "dsum");
    op.z = z.const_data_ptr();
    op.mean = mean ? row_statistics(*mean, rows, "mean") : nullptr;
    op.rstd = row_statistics(rstd, rows, "rstd");
    op.weight = parameter(weight, width, "weight");
    op.row_scale = row_scale ? row_statistics(*row_scale, rows, "row_scale") : nullptr;
    op.dropout = dropout_of(rng_state, keys, stream, threshold, rows);
    op.sum_dx = linear_bias.has_value();

    const bool dx_differs = row_scale.has_value() || op.dropout.threshold;
    Tensor dz = new_like(z);
    Tensor dx = dx_differs ? new_like(z) : no_tensor(z);
    op.dz = dz.mutable_data_ptr();
    op.dx = dx_differs ? dx.mutable_data_ptr() : nullptr;
    const auto [dweight, dbias, dlinear_bias] = run(op, z, {weight, bias, linear_bias});
    return {dz, dx, dweight, dbias, dlinear_bias};
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels, CPU, m) {
    m.impl("layer_norm_forward", TORCH_BOX(&forward<forward_on_cpu>));
    m.impl("layer_norm_backward", TORCH_BOX(&backward<backward_on_cpu>));
}

#ifdef VLK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(vlkernels, CUDA, m) {
    m.impl("layer_norm_forward", TORCH_BOX(&forward<forward_on_cuda>));
    m.impl("layer_norm_backward", TORCH_BOX(&backward<backward_on_cuda>));
}
#endif

}  // namespace
}  // namespace vlk
