#include "optimal_transport/optimal_transport_cpu.h"

#include "binding/binding.h"

namespace vlk {
namespace {

// The rows of one segment of every sample.
struct Side {
    Side(const Tensor& tokens_, const Tensor& starts, const Tensor& lengths, int64_t segment,
         const char* name)
        : tokens(tokens_), samples(lengths.size(0)) {
        STD_TORCH_CHECK(tokens.dim() == 2 && lengths.dim() == 2, name, " must be [T, D] with lengths [B, S]");
        STD_TORCH_CHECK(segment >= 0 && segment < lengths.size(1), name, " has no segment ", segment);
        check_contiguous(tokens, name);
        check_numel(starts, lengths.numel(), "starts");
        rows.data = tokens.const_data_ptr();
        rows.step = lengths.size(1);
        rows.starts = read<int32_t>(starts, ScalarType::Int, "starts") + segment;
        rows.lengths = read<int32_t>(lengths, ScalarType::Int, "lengths") + segment;
        for (int64_t b = 0; b < samples; ++b) {
            const int64_t start = rows.starts[b * rows.step], length = rows.lengths[b * rows.step];
            STD_TORCH_CHECK(start >= 0 && length >= 0 && start + length <= tokens.size(0), "sample ", b,
                            " has ", length, " rows from row ", start, " of ", tokens.size(0), " of ", name);
            rows.longest = std::max(rows.longest, length);
            total += length;
        }
    }

    // Zeros where not every row will be written.
    Tensor new_gradient() const {
        const std::vector<int64_t> shape{tokens.size(0), tokens.size(1)};
        return total == tokens.size(0) ? torch::stable::new_empty(tokens, shape)
                                       : torch::stable::new_zeros(tokens, shape);
    }

    const Tensor& tokens;
    const int64_t samples;
    int64_t total = 0;
    TokenRows rows;
};

// Both sides, whose plans have room for `longest` tokens.
void set_sides(Transport& op, const Side& images, const Side& texts, int64_t longest_image,
               int64_t longest_text) {
    STD_TORCH_CHECK(images.samples == texts.samples, "both sides must have as many samples, got ",
                    images.samples, " and ", texts.samples);
    check_type(texts.tokens, images.tokens.scalar_type(), "text_tokens");
    STD_TORCH_CHECK(texts.tokens.size(1) == images.tokens.size(1), "both sides must have as many columns");
    STD_TORCH_CHECK(images.rows.longest <= longest_image && texts.rows.longest <= longest_text,
                    "a sample has ", texts.rows.longest, " texts or ", images.rows.longest,
                    " images, more than there is room for: ", longest_text, " and ", longest_image);
    op.dtype = dtype_of(images.tokens, "image_tokens");
    op.width = images.tokens.size(1);
    op.images = images.rows;
    op.texts = texts.rows;
    op.images.longest = longest_image;
    op.texts.longest = longest_text;
}

// A thread is worth waking for a million products.
template <typename Work>
void parallel_samples(const Transport& op, int64_t samples, const Work& work) {
    const int64_t products = op.texts.longest * op.images.longest * (op.width + 50);
    const int64_t grain = std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(1, products));
    torch::stable::parallel_for(0, samples, grain, work);
}

std::tuple<Tensor, Tensor> forward(const Tensor& image_tokens, const Tensor& text_tokens,
                                   const Tensor& image_starts, const Tensor& image_lengths,
                                   const Tensor& text_starts, const Tensor& text_lengths,
                                   int64_t image_segment, int64_t text_segment, int64_t longest_image,
                                   int64_t longest_text, double beta, int64_t iterations, bool gradient) {
    const Side images(image_tokens, image_starts, image_lengths, image_segment, "image_tokens");
    const Side texts(text_tokens, text_starts, text_lengths, text_segment, "text_tokens");
    TransportForward op{};
    set_sides(op, images, texts, longest_image, longest_text);
    Tensor distances = new_float(image_tokens, {images.samples});
    const std::vector<int64_t> none{0}, all{images.samples, longest_text, longest_image};
    Tensor plans = new_float(image_tokens, gradient ? all : none);
    op.plans = gradient ? static_cast<float*>(plans.mutable_data_ptr()) : nullptr;
    op.distances = static_cast<float*>(distances.mutable_data_ptr());
    op.beta = static_cast<float>(beta);
    op.iterations = iterations;
    const auto kernel = VLK_CPU(optimal_transport_forward);
    parallel_samples(op, images.samples, [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
    return {distances, plans};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_distances, const Tensor& image_tokens,
                                    const Tensor& text_tokens, const Tensor& image_starts,
                                    const Tensor& image_lengths, const Tensor& text_starts,
                                    const Tensor& text_lengths, int64_t image_segment, int64_t text_segment,
                                    const Tensor& plans) {
    const Side images(image_tokens, image_starts, image_lengths, image_segment, "image_tokens");
    const Side texts(text_tokens, text_starts, text_lengths, text_segment, "text_tokens");
    STD_TORCH_CHECK(plans.dim() == 3 && plans.size(0) == images.samples, "plans must be [B, texts, images]");
    TransportBackward op{};
    set_sides(op, images, texts, plans.size(2), plans.size(1));
    check_numel(grad_distances, images.samples, "grad_distances");
    op.grad_distances = read<float>(grad_distances, ScalarType::Float, "grad_distances");
    op.plans = const_cast<float*>(read<float>(plans, ScalarType::Float, "plans"));
    Tensor grad_images = images.new_gradient(), grad_texts = texts.new_gradient();
    op.grad_images = grad_images.mutable_data_ptr();
    op.grad_texts = grad_texts.mutable_data_ptr();
    const auto kernel = VLK_CPU(optimal_transport_backward);
    parallel_samples(op, images.samples, [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
    return {grad_images, grad_texts};
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels, CPU, m) {
    m.impl("optimal_transport_forward", TORCH_BOX(&forward));
    m.impl("optimal_transport_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace vlk
