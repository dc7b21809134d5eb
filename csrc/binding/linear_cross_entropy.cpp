#include "linear_cross_entropy/linear_cross_entropy_cpu.h"

#include "binding/binding.h"

namespace vlk {
namespace {

// Memory of what the steps leave for each other.
std::vector<float> make_workspace(LogitColumns& op) {
    const int64_t of_blocks = blocks_of(op) * op.rows, statistics = op.label_smoothing > 0 ? 3 : 2;
    std::vector<float> memory(4 * op.rows + statistics * of_blocks);
    float* next = memory.data();
    for (float** part : {&op.at_target, &op.shift, &op.factor, &op.offset}) *part = next, next += op.rows;
    op.largest = next, op.total = next + of_blocks;
    op.sum = op.label_smoothing > 0 ? next + 2 * of_blocks : nullptr;
    return memory;
}

// Losses of the rows. With `gradient` their derivatives take the place of the logits, and are summed over the rows too.
std::tuple<Tensor, Tensor> classify(Tensor logits, const std::optional<Tensor>& bias, const Tensor& targets,
                                    const std::optional<Tensor>& cotangents, double label_smoothing, double z_loss,
                                    bool gradient) {
    STD_TORCH_CHECK(logits.dim() == 2, "logits must have two dimensions");
    check_contiguous(logits, "logits");
    LogitColumns op{};
    op.entries = logits.size(0), op.rows = logits.size(1);
    op.dtype = dtype_of(logits, "logits"), op.logits = logits.mutable_data_ptr();
    op.label_smoothing = label_smoothing, op.z_loss = z_loss;
    check_numel(targets, op.rows, "targets");
    op.targets = read<int64_t>(targets, ScalarType::Long, "targets");
    STD_TORCH_CHECK(std::all_of(op.targets, op.targets + op.rows, [&](int64_t t) { return t >= 0 && t < op.entries; }),
                    "targets must be in [0, ", op.entries, ")");
    if (bias) {
        check_numel(*bias, op.entries, "bias");
        op.bias = read<float>(*bias, ScalarType::Float, "bias");
    }
    if (cotangents) {
        check_numel(*cotangents, op.rows, "cotangents");
        op.cotangents = read<float>(*cotangents, ScalarType::Float, "cotangents");
    }
    Tensor losses = new_float(logits, {op.rows}), over_rows = new_float(logits, {gradient ? op.entries : 0});
    op.losses = static_cast<float*>(losses.mutable_data_ptr());
    op.over_rows = static_cast<float*>(over_rows.mutable_data_ptr());
    const std::vector<float> memory = make_workspace(op);
    const auto over_blocks = [&](auto step) {
        parallel_rows(blocks_of(op), entries_of_block * op.rows * logits.element_size(),
                      [&](int64_t begin, int64_t end) { step(op, begin, end); });
    };
    VLK_CPU(set_targets_apart)(op);
    over_blocks(VLK_CPU(reduce_blocks));
    const int64_t row_bytes = static_cast<int64_t>(memory.size() * sizeof(float)) / std::max<int64_t>(op.rows, 1);
    parallel_rows(op.rows, row_bytes, [&, step = VLK_CPU(find_losses)](int64_t begin, int64_t end) { step(op, begin, end); });
    if (gradient) {
        over_blocks(VLK_CPU(differentiate_blocks));
        VLK_CPU(put_targets_back)(op);
    }
    return {losses, over_rows};
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels, CPU, m) { m.impl("classify", TORCH_BOX(&classify)); }

}  // namespace
}  // namespace vlk
