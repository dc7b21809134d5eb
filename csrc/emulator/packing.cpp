// The CUDA kernels of packing as Python functions that run in the emulator.
#include "emulator/emulator.h"
#include "emulator/module.h"
#include "packing/packing.cuh"

namespace vlk::emulator {
namespace {

const auto run = [](auto kernel, dim3 grid, dim3 block, int64_t shared_bytes, const auto& op) {
    launch(kernel, grid, block, static_cast<size_t>(shared_bytes), op);
};

template <typename Op>
Op moved_segments(const Fields& given) {
    Op op{};
    op.segments = given.segments();
    op.packed = given.pointer_to<char>("packed");
    op.packed_rows = given.integer("packed_rows");
    op.row_bytes = given.integer("row_bytes");
    op.parts.starts = given.pointer_to<int32_t>("part_starts");
    const auto part_of = given.integers("part_of"), data = given.integers("parts"), rows = given.integers("part_rows");
    op.parts.count = static_cast<int32_t>(data.size());
    for (size_t segment = 0; segment < part_of.size(); ++segment) op.parts.part_of[segment] = static_cast<int32_t>(part_of[segment]);
    for (size_t part = 0; part < data.size(); ++part) {
        op.parts.data[part] = reinterpret_cast<char*>(data[part]);
        op.parts.rows[part] = rows[part];
    }
    return op;
}

Positions positions(const Fields& given) {
    return {given.pointer("positions"), given.integer("is_wide") != 0, given.integer("count")};
}

void take_rows(const py::dict& fields) {
    const Fields given(fields);
    const TakeRows op{positions(given),     given.pointer_to<char>("x"), given.integer("x_rows"), given.pointer_to<char>("out"),
                      given.integer("rows"), given.integer("row_bytes")};
    launch_take_rows(op, run);
}

void take_rows_backward(const py::dict& fields) {
    const Fields given(fields);
    const TakeRowsBackward op{given.dtype("dtype"),  given.integer("width"), positions(given),     given.pointer_to<int64_t>("order"),
                              given.pointer("grad"), given.pointer("out"),   given.integer("rows")};
    launch_take_rows_backward(op, run);
}

// Both directions of the mean have the same fields.
template <typename Op>
Op mean_op(const py::dict& fields) {
    const Fields given(fields);
    Op op{};
    op.dtype = given.dtype("dtype");
    op.width = given.integer("width");
    op.segments = given.segments();
    op.segment = static_cast<int32_t>(given.integer("segment"));
    op.rows = given.integer("rows");
    return op;
}

void mean_segment(const py::dict& fields) {
    MeanSegment op = mean_op<MeanSegment>(fields);
    op.x = Fields(fields).pointer("x");
    op.mean = Fields(fields).pointer("mean");
    launch_mean_segment(op, run);
}

void mean_segment_backward(const py::dict& fields) {
    MeanSegmentBackward op = mean_op<MeanSegmentBackward>(fields);
    op.grad = Fields(fields).pointer("grad");
    op.out = Fields(fields).pointer("out");
    launch_mean_segment_backward(op, run);
}

py::dict described(const RowCopyPlan& plan) {
    py::dict found;
    found["unit_bytes"] = plan.unit_bytes;
    found["threads"] = plan.threads;
    found["rows_at_once"] = plan.rows_at_once;
    found["rows_per_block"] = plan.rows_per_block;
    found["blocks"] = plan.blocks;
    found["column_blocks"] = plan.column_blocks;
    return found;
}

}  // namespace

PYBIND11_MODULE(VLK_MODULE, m) {
    bind_schedule(m);
    m.def("join_segments", [](const py::dict& fields) { launch_join_segments(moved_segments<JoinSegments>(Fields(fields)), run); });
    m.def("split_segments", [](const py::dict& fields) { launch_split_segments(moved_segments<SplitSegments>(Fields(fields)), run); });
    m.def("take_rows", &take_rows);
    m.def("take_rows_backward", &take_rows_backward);
    m.def("mean_segment", &mean_segment);
    m.def("mean_segment_backward", &mean_segment_backward);
    m.def("copy_plan", [](int64_t rows, int64_t row_bytes, int unit) { return described(plan_row_copy(rows, row_bytes, unit)); });
}

}  // namespace vlk::emulator
