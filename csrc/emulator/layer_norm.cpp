// The CUDA kernels of LayerNorm as Python functions that run in the emulator.
#include "emulator/emulator.h"
#include "emulator/module.h"
#include "layer_norm/layer_norm.cuh"

namespace vlk::emulator {
namespace {

const auto run = [](auto kernel, dim3 grid, dim3 block, int64_t shared_bytes, const auto& op) {
    launch(kernel, grid, block, static_cast<size_t>(shared_bytes), op);
};

void forward(const py::dict& fields) {
    const Fields given(fields);
    LayerNormForward op{};
    op.dtype = given.dtype("dtype");
    op.width = given.integer("width");
    op.rows = given.integer("rows");
    op.eps = given.number("eps");
    op.x = given.pointer("x");
    op.residual = given.pointer("residual");
    op.linear_bias = given.parameter("linear_bias");
    op.weight = given.parameter("weight");
    op.bias = given.parameter("bias");
    op.row_scale = given.pointer_to<float>("row_scale");
    op.dropout = given.dropout();
    op.y = given.pointer("y");
    op.z = given.pointer("z");
    op.mean = given.pointer_to<float>("mean");
    op.rstd = given.pointer_to<float>("rstd");
    launch_layer_norm_forward(op, run);
}

LayerNormBackward backward_op(const Fields& given) {
    LayerNormBackward op{};
    op.dtype = given.dtype("dtype");
    op.width = given.integer("width");
    op.rows = given.integer("rows");
    op.dy = given.pointer("dy");
    op.dsum = given.pointer("dsum");
    op.z = given.pointer("z");
    op.mean = given.pointer_to<float>("mean");
    op.rstd = given.pointer_to<float>("rstd");
    op.weight = given.parameter("weight");
    op.row_scale = given.pointer_to<float>("row_scale");
    op.dropout = given.dropout();
    op.dz = given.pointer("dz");
    op.dx = given.pointer("dx");
    op.partials = given.pointer_to<float>("partials");
    op.sum_dx = given.gradient("dlinear_bias").data;
    return op;
}

void backward(const py::dict& fields) {
    const Fields given(fields);
    LayerNormBackward op = backward_op(given);
    op.num_chunks = plan_backward(op).blocks;
    const PartialRows<3> sums{op.partials, op.num_chunks, op.width,
                              {given.gradient("dweight"), given.gradient("dbias"), given.gradient("dlinear_bias")}};
    launch_layer_norm_backward(op, sums, run);
}

}  // namespace

PYBIND11_MODULE(VLK_MODULE, m) {
    bind_schedule(m);
    m.attr("widest_row") = widest_row;
    m.def("forward", &forward);
    m.def("backward", &backward);
    m.def("partial_rows", [](const py::dict& fields) { return plan_backward(backward_op(Fields(fields))).blocks; });
}

}  // namespace vlk::emulator
