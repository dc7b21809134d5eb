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

}  // namespace

PYBIND11_MODULE(VLK_MODULE, m) {
    bind_schedule(m);
    m.def("forward", &forward);
}

}  // namespace vlk::emulator
