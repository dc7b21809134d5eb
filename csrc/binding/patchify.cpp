#include "binding/binding.h"
#include "patchify/patchify_cpu.h"

#ifdef VLK_WITH_CUDA
#include "binding/cuda.h"
#include "patchify/patchify_cuda.h"
#endif

namespace vlk {
namespace {

using OptionalTensor = std::optional<Tensor>;

// `shape` is that of the images.
PatchGrid grid_of(const std::vector<int64_t>& shape, const OptionalTensor& sizes, const Tensor& starts, const Tensor& lengths,
                  int64_t patch, int64_t rows) {
    STD_TORCH_CHECK(shape.size() == 4, "images must be [B, C, H, W]");
    STD_TORCH_CHECK(patch >= 1, "patch_size must be at least 1, got ", patch);
    const int64_t batch = shape[0], channels = shape[1];
    check_numel(starts, batch, "starts");
    check_numel(lengths, batch, "lengths");
    if (sizes) check_numel(*sizes, 2 * batch, "sizes");
    STD_TORCH_CHECK(shape[2] <= INT32_MAX && shape[3] <= INT32_MAX && patch <= 4096 && channels <= INT32_MAX / (patch * patch),
                    "a patch must have less than 2**31 elements");
    return {batch, channels, shape[2], shape[3], patch, sizes ? read<int32_t>(*sizes, ScalarType::Int, "sizes") : nullptr,
            read<int32_t>(starts, ScalarType::Int, "starts"), read<int32_t>(lengths, ScalarType::Int, "lengths"), rows};
}

PixelScale scale_of(const std::vector<double>& scale, const std::vector<double>& shift, int64_t channels) {
    PixelScale normalize{!scale.empty(), {}, {}};
    if (!normalize.is_given) return normalize;
    STD_TORCH_CHECK(channels <= most_normalized_channels, "at most ", most_normalized_channels, " channels are normalized, got ", channels);
    STD_TORCH_CHECK(static_cast<int64_t>(scale.size()) == channels && (shift.empty() || shift.size() == scale.size()),
                    "scale and shift must have one value per channel");
    std::copy(scale.begin(), scale.end(), normalize.scale);
    std::copy(shift.begin(), shift.end(), normalize.shift);
    return normalize;
}

void patchify_on_cpu(const Patchify& op, const Tensor&) {
    const auto kernel = VLK_CPU(patchify);
    parallel_rows(op.grid.rows, 8 * patch_elements(op.grid), [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
}

void backward_on_cpu(const PatchifyBackward& op, const Tensor&) {
    const auto kernel = VLK_CPU(patchify_backward);
    parallel_rows(lines_of(op.grid), 8 * op.grid.width, [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
}

#ifdef VLK_WITH_CUDA
void patchify_on_cuda(const Patchify& op, const Tensor& images) {
    const OnDeviceOf device(images);
    check_launch(patchify_cuda(op, device.stream()), "patchify");
}

void backward_on_cuda(const PatchifyBackward& op, const Tensor& grad) {
    const OnDeviceOf device(grad);
    check_launch(patchify_backward_cuda(op, device.stream()), "patchify_backward");
}
#endif

template <auto run>
Tensor forward(const Tensor& images, const OptionalTensor& sizes, const Tensor& starts, const Tensor& lengths, int64_t patch,
               const std::vector<double>& scale, const std::vector<double>& shift, ScalarType dtype, int64_t num_rows) {
    check_same_device(images, {sizes, starts, lengths});
    check_contiguous(images, "images");
    const auto sides = images.sizes();
    Patchify op{};
    op.grid = grid_of({sides.begin(), sides.end()}, sizes, starts, lengths, patch, num_rows);
    op.normalize = scale_of(scale, shift, op.grid.channels);
    op.images_are_bytes = images.scalar_type() == ScalarType::Byte;
    if (!op.images_are_bytes) check_type(images, dtype, "images");
    STD_TORCH_CHECK(op.normalize.is_given || !op.images_are_bytes || op.grid.channels == 0, "images of bytes need a scale");
    Tensor patches = torch::stable::new_empty(images, {num_rows, patch_elements(op.grid)}, std::make_optional(dtype));
    op.dtype = dtype_of(patches, "patches");
    op.images = images.const_data_ptr();
    op.patches = patches.mutable_data_ptr();
    run(op, images);
    return patches;
}

template <auto run>
Tensor backward(const Tensor& grad, const OptionalTensor& sizes, const Tensor& starts, const Tensor& lengths, int64_t patch,
                const std::vector<double>& scale, const std::vector<int64_t>& shape) {
    check_same_device(grad, {sizes, starts, lengths});
    check_contiguous(grad, "grad");
    PatchifyBackward op{};
    op.dtype = dtype_of(grad, "grad");
    op.grid = grid_of(shape, sizes, starts, lengths, patch, grad.size(0));
    check_numel(grad, op.grid.rows * patch_elements(op.grid), "grad");
    op.normalize = scale_of(scale, {}, op.grid.channels);
    Tensor images = torch::stable::new_empty(grad, shape);
    op.patches = grad.const_data_ptr();
    op.images = images.mutable_data_ptr();
    run(op, grad);
    return images;
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels, CPU, m) {
    m.impl("patchify", TORCH_BOX(&forward<patchify_on_cpu>));
    m.impl("patchify_backward", TORCH_BOX(&backward<backward_on_cpu>));
}

#ifdef VLK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(vlkernels, CUDA, m) {
    m.impl("patchify", TORCH_BOX(&forward<patchify_on_cuda>));
    m.impl("patchify_backward", TORCH_BOX(&backward<backward_on_cuda>));
}
#endif

}  // namespace
}  // namespace vlk
