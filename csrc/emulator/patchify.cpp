// The CUDA kernels of patchify as Python functions that run in the emulator.
#include "emulator/emulator.h"
#include "emulator/module.h"
#include "patchify/patchify.cuh"

namespace vlk::emulator {
namespace {

const auto run = [](auto kernel, dim3 grid, dim3 block, int64_t shared_bytes, const auto& op) {
    launch(kernel, grid, block, static_cast<size_t>(shared_bytes), op);
};

PatchGrid grid_of(const Fields& given) {
    return {given.integer("batch"),  given.integer("channels"), given.integer("height"), given.integer("width"),
            given.integer("patch"),  given.pointer_to<int32_t>("sizes"), given.pointer_to<int32_t>("starts"),
            given.pointer_to<int32_t>("lengths"), given.integer("rows")};
}

PixelScale scale_of(const Fields& given) {
    const std::vector<float> scale = given.numbers("scale"), shift = given.numbers("shift");
    PixelScale normalize{!scale.empty(), {}, {}};
    std::copy(scale.begin(), scale.end(), normalize.scale);
    std::copy(shift.begin(), shift.end(), normalize.shift);
    return normalize;
}

void patchify(const py::dict& fields) {
    const Fields given(fields);
    launch_patchify({given.dtype("dtype"), given.integer("images_are_bytes") != 0, grid_of(given), scale_of(given),
                     given.pointer("images"), given.pointer("patches")}, run);
}

void patchify_backward(const py::dict& fields) {
    const Fields given(fields);
    launch_patchify_backward({given.dtype("dtype"), grid_of(given), scale_of(given), given.pointer("patches"), given.pointer("images")}, run);
}

}  // namespace

PYBIND11_MODULE(VLK_MODULE, m) {
    bind_schedule(m);
    m.def("patchify", &patchify);
    m.def("patchify_backward", &patchify_backward);
}

}  // namespace vlk::emulator
