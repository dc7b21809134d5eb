#include "sigmoid_loss/sigmoid_loss_cpu.h"

#include "binding/binding.h"

namespace vlk {
namespace {

float number(const Tensor& tensor, const char* name) {
    check_numel(tensor, 1, name);
    return *read<float>(tensor, ScalarType::Float, name);
}

// Sums over a tile of losses, of their derivatives by logits times similarities, and of derivatives: [3]. The latter two are
// zeros without `gradient`; with it the derivatives take the place of the similarities.
Tensor weigh(Tensor tile, const Tensor& row_ids, const Tensor& column_ids, const Tensor& scale, const Tensor& bias,
             bool gradient) {
    STD_TORCH_CHECK(tile.dim() == 2, "tile must have two dimensions");
    check_type(tile, ScalarType::Float, "tile");
    check_contiguous(tile, "tile");
    SigmoidTile op{};
    op.rows = tile.size(0), op.columns = tile.size(1);
    check_numel(row_ids, op.rows, "row_ids");
    check_numel(column_ids, op.columns, "column_ids");
    op.tile = static_cast<float*>(tile.mutable_data_ptr());
    op.row_ids = read<int32_t>(row_ids, ScalarType::Int, "row_ids");
    op.column_ids = read<int32_t>(column_ids, ScalarType::Int, "column_ids");
    op.scale = number(scale, "scale"), op.bias = number(bias, "bias");
    op.gradient = gradient;
    std::vector<float> of_rows(3 * op.rows);
    op.sums = of_rows.data();
    parallel_rows(op.rows, op.columns * sizeof(float), [&, kernel = VLK_CPU(weigh_pairs)](int64_t begin, int64_t end) {
        kernel(op, begin, end);
    });
    Tensor sums = new_float(tile, {3});
    for (int64_t k = 0; k < 3; ++k) {
        double total = 0;
        for (int64_t row = 0; row < op.rows; ++row) total += of_rows[3 * row + k];
        static_cast<float*>(sums.mutable_data_ptr())[k] = static_cast<float>(total);
    }
    return sums;
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels, CPU, m) { m.impl("weigh_pairs", TORCH_BOX(&weigh)); }

}  // namespace
}  // namespace vlk
