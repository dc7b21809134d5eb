#include "linear/linear_cpu.h"

#include "binding/binding.h"

namespace vlk {
namespace {

Matrix matrix(const Tensor& tensor, const char* name) {
    check_type(tensor, ScalarType::Float, name);
    STD_TORCH_CHECK(tensor.dim() == 2, name, " must have two dimensions");
    return {static_cast<const float*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

Matrix transposed(Matrix matrix) { return {matrix.data, matrix.column, matrix.row}; }

void multiply(Tensor& out, Product op) {
    const int64_t strips = (op.columns + strip_columns - 1) / strip_columns;
    Tensor packed = torch::stable::new_empty(out, {op.depth * strips * strip_columns});
    op.out = static_cast<float*>(out.mutable_data_ptr());
    op.packed = static_cast<float*>(packed.mutable_data_ptr());
    const int64_t strip_bytes = strip_columns * op.depth * static_cast<int64_t>(sizeof(float));
    parallel_rows(strips, strip_bytes, [&, kernel = VLK_CPU(pack_right)](int64_t begin, int64_t end) {
        kernel(op, begin, end);
    });
    torch::stable::parallel_for(
        0, (op.rows + strip_rows - 1) / strip_rows, 1,
        [&, kernel = VLK_CPU(multiply_rows)](int64_t begin, int64_t end) { kernel(op, begin, end); });
}

Tensor product(const Tensor& like, const Product& op) {
    Tensor out = torch::stable::new_empty(like, {op.rows, op.columns});
    multiply(out, op);
    return out;
}

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    Product op{};
    op.left = matrix(x, "x");
    op.right = transposed(matrix(weight, "weight"));
    op.rows = x.size(0), op.depth = x.size(1), op.columns = weight.size(0);
    STD_TORCH_CHECK(weight.size(1) == op.depth, "rows of x and weight must be equally long");
    if (bias) {
        check_numel(*bias, op.columns, "bias");
        op.bias = read<float>(*bias, ScalarType::Float, "bias");
    }
    return product(x, op);
}

Tensor input_gradient(const Tensor& dy, const Tensor& weight) {
    Product op{};
    op.left = matrix(dy, "dy");
    op.right = matrix(weight, "weight");
    op.rows = dy.size(0), op.depth = dy.size(1), op.columns = weight.size(1);
    STD_TORCH_CHECK(weight.size(0) == op.depth, "rows of dy must be as long as weight");
    return product(dy, op);
}

Tensor weight_gradient(const Tensor& dy, const Tensor& x) {
    Product op{};
    op.left = transposed(matrix(dy, "dy"));
    op.right = matrix(x, "x");
    op.rows = dy.size(1), op.depth = dy.size(0), op.columns = x.size(1);
    STD_TORCH_CHECK(x.size(0) == op.depth, "dy and x must have equally many rows");
    return product(dy, op);
}

// Gradients by x and by weight, empty where they are not wanted.
std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight, bool of_x,
                                    bool of_weight) {
    const auto empty = [&] { return torch::stable::new_empty(dy, {0}); };
    return {of_x ? input_gradient(dy, weight) : empty(), of_weight ? weight_gradient(dy, x) : empty()};
}

// out = (out +) left right
void multiply_into(Tensor out, const Tensor& left, const Tensor& right, bool add) {
    Product op{};
    op.left = matrix(left, "left");
    op.right = matrix(right, "right");
    op.rows = left.size(0), op.depth = left.size(1), op.columns = right.size(1), op.add = add;
    STD_TORCH_CHECK(right.size(0) == op.depth, "left and right do not fit each other");
    check_type(out, ScalarType::Float, "out");
    check_contiguous(out, "out");
    STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == op.rows && out.size(1) == op.columns,
                    "out must be [rows of left, columns of right]");
    multiply(out, op);
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels, CPU, m) {
    m.impl("linear_forward", TORCH_BOX(&forward));
    m.impl("linear_backward", TORCH_BOX(&backward));
    m.impl("multiply_into", TORCH_BOX(&multiply_into));
}

}  // namespace
}  // namespace vlk
