// The CUDA kernels of a LayerNorm of a sum of embeddings as Python functions that run in the emulator.
#include "emulator/emulator.h"
#include "emulator/module.h"
#include "embed_layer_norm/embed_layer_norm.cuh"
#include "embed_layer_norm/table_gradients.cuh"

namespace vlk::emulator {
namespace {

const auto run = [](auto kernel, dim3 grid, dim3 block, int64_t shared_bytes, const auto& op) {
    launch(kernel, grid, block, static_cast<size_t>(shared_bytes), op);
};

// Owns the lists that `sum` shows.
struct Sum {
    std::vector<const void*> tables;
    std::vector<int64_t> table_rows;
    EmbeddingSum sum{};

    explicit Sum(const Fields& given) : table_rows(given.integers("table_rows")) {
        for (const int64_t address : given.integers("tables")) tables.push_back(reinterpret_cast<const void*>(address));
        sum.dtype = given.dtype("dtype");
        sum.width = given.integer("width");
        sum.rows = given.integer("rows");
        sum.num_tables = static_cast<int64_t>(tables.size());
        sum.ids = {given.pointer("ids"), given.integer("wide_ids") != 0};
        sum.tables = tables.data();
        sum.table_rows = table_rows.data();
        sum.dense = given.pointer("dense");
    }
};

RowNorms row_norms(const Fields& given) {
    return {{given.pointer("norm_ids"), given.integer("wide_norm_ids") != 0}, given.integer("norms")};
}

void forward(const py::dict& fields) {
    const Fields given(fields);
    const Sum sum(given);
    EmbedLayerNormForward op{};
    op.sum = sum.sum;
    op.norms = row_norms(given);
    op.eps = given.number("eps");
    op.weight = given.parameter("weight");
    op.bias = given.parameter("bias");
    op.dropout = given.dropout();
    op.y = given.pointer("y");
    op.mean = given.pointer_to<float>("mean");
    op.rstd = given.pointer_to<float>("rstd");
    launch_embed_layer_norm_forward(op, run);
}

EmbedLayerNormBackward backward_op(const Fields& given, const Sum& sum) {
    EmbedLayerNormBackward op{};
    op.sum = sum.sum;
    op.norms = row_norms(given);
    op.dy = given.pointer("dy");
    op.mean = given.pointer_to<float>("mean");
    op.rstd = given.pointer_to<float>("rstd");
    op.weight = given.parameter("weight");
    op.dropout = given.dropout();
    op.dz = given.pointer("dz");
    op.partials = given.pointer_to<float>("partials");
    op.num_chunks = plan_embed_backward(op).blocks;
    return op;
}

void backward(const py::dict& fields) {
    const Fields given(fields);
    const Sum sum(given);
    const EmbedLayerNormBackward op = backward_op(given, sum);
    const PartialRows<2> sums{op.partials, op.num_chunks, op.norms.count * op.sum.width,
                              {given.gradient("dweight"), given.gradient("dbias")}};
    launch_embed_layer_norm_backward(op, sums, run);
}

int64_t partial_rows(const py::dict& fields) {
    const Fields given(fields);
    return backward_op(given, Sum(given)).num_chunks;
}

TableGradients tables_op(const Fields& given) {
    TableGradients op{};
    op.dtype = given.dtype("dtype");
    op.tokens = given.integer("tokens");
    op.width = given.integer("width");
    op.id_stride = given.integer("id_stride");
    op.ids = {given.pointer("ids"), given.integer("wide_ids") != 0};
    op.gradient = given.pointer("gradient");
    const std::vector<int64_t> columns = given.integers("columns"), rows = given.integers("table_rows");
    const std::vector<int64_t> tables = given.integers("tables");
    op.num_tables = static_cast<int64_t>(columns.size());
    for (size_t k = 0; k < columns.size(); ++k) {
        op.column[k] = columns[k];
        op.first_row[k + 1] = op.first_row[k] + static_cast<int32_t>(rows[k]);
        op.table[k] = reinterpret_cast<void*>(tables[k]);
    }
    op.integers = given.pointer_to<int32_t>("integers");
    op.partials = given.pointer_to<float>("partials");
    return op;
}

std::pair<int64_t, int64_t> table_workspace(const py::dict& fields) {
    const TablePlan plan = plan_table_gradients(tables_op(Fields(fields)));
    return {plan.integers, plan.floats};
}

}  // namespace

PYBIND11_MODULE(VLK_MODULE, m) {
    bind_schedule(m);
    m.attr("widest_row") = widest_row;
    m.attr("most_tables") = most_tables;
    m.def("forward", &forward);
    m.def("backward", &backward);
    m.def("partial_rows", &partial_rows);
    m.def("table_gradients", [](const py::dict& fields) { launch_table_gradients(tables_op(Fields(fields)), run); });
    m.def("table_workspace", &table_workspace);
}

}  // namespace vlk::emulator
