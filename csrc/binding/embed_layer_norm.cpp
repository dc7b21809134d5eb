#include "embed_layer_norm/embed_layer_norm_cpu.h"

#include "binding/norm.h"

namespace vlk {
namespace {

// Checked views of the arguments that make z; owns the list of pointers `sum` shows.
struct SumArguments {
    EmbeddingSum sum{};
    std::vector<const void*> pointers;

    SumArguments(const Tensor& like, int64_t rows, const OptionalTensor& ids,
                 const std::vector<Tensor>& tables, const OptionalTensor& dense) {
        const int64_t width = like.size(like.dim() - 1), count = static_cast<int64_t>(tables.size());
        for (const Tensor& table : tables) {
            check_type(table, like.scalar_type(), "tables");
            check_contiguous(table, "tables");
            STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == width, "tables must be [V, ", width, "]");
            pointers.push_back(table.const_data_ptr());
        }
        STD_TORCH_CHECK(ids.has_value() || count == 0, "tables need ids");
        if (count) check_numel(*ids, rows * count, "ids");
        if (dense) {
            check_type(*dense, like.scalar_type(), "dense");
            check_numel(*dense, rows * width, "dense");
            check_contiguous(*dense, "dense");
        }
        sum.dtype = dtype_of(like, "tables");
        sum.width = width;
        sum.rows = rows;
        sum.num_tables = count;
        sum.ids = count ? read<int32_t>(*ids, ScalarType::Int, "ids") : nullptr;
        sum.tables = pointers.data();
        sum.dense = data_or_null(dense);
        for (int64_t table = 0; table < count; ++table) check_ids(table, tables[table].size(0));
    }

    void check_ids(int64_t table, int64_t table_rows) const {
        int32_t largest = -1;
        for (int64_t row = 0; row < sum.rows; ++row)
            largest = std::max(largest, sum.ids[row * sum.num_tables + table]);
        STD_TORCH_CHECK(largest < table_rows, "ids[:, ", table, "] must be below ", table_rows, ", got ",
                        largest);
    }
};

std::tuple<Tensor, Tensor, Tensor> forward(const OptionalTensor& ids, const std::vector<Tensor>& tables,
                                           const OptionalTensor& dense, const OptionalTensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& rng_state,
                                           const OptionalTensor& keys, int64_t stream, int64_t threshold,
                                           double eps) {
    STD_TORCH_CHECK(dense.has_value() || !tables.empty(), "there must be a table or a dense term");
    STD_TORCH_CHECK(ids.has_value() || tables.empty(), "tables need ids");
    const Tensor& like = dense ? *dense : tables[0];
    const int64_t rows = dense ? dense->size(0) : ids->size(0);
    const SumArguments arguments(like, rows, ids, tables, dense);
    const int64_t width = arguments.sum.width;
    Tensor y = torch::stable::new_empty(like, {rows, width});
    Tensor mean = new_float(like, {rows}), rstd = new_float(like, {rows});
    EmbedLayerNormForward op{};
    op.sum = arguments.sum;
    op.eps = static_cast<float>(eps);
    op.weight = parameter(weight, width, "weight");
    op.bias = parameter(bias, width, "bias");
    op.dropout = dropout_of(rng_state, keys, stream, threshold, rows);
    op.y = y.mutable_data_ptr();
    op.mean = static_cast<float*>(mean.mutable_data_ptr());
    op.rstd = static_cast<float*>(rstd.mutable_data_ptr());
    parallel_rows(rows, 16 * width,
                  [&, kernel = VLK_CPU(embed_layer_norm_forward)](int64_t begin, int64_t end) {
                      kernel(op, begin, end);
                  });
    return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& mean, const Tensor& rstd,
                                            const OptionalTensor& ids, const std::vector<Tensor>& tables,
                                            const OptionalTensor& dense, const OptionalTensor& weight,
                                            const OptionalTensor& bias, const OptionalTensor& rng_state,
                                            const OptionalTensor& keys, int64_t stream, int64_t threshold) {
    check_contiguous(dy, "dy");
    const int64_t rows = dy.size(0);
    const SumArguments arguments(dy, rows, ids, tables, dense);
    const int64_t width = arguments.sum.width;
    const PartialRows partials(dy, rows, 2, width);
    Tensor dz = torch::stable::empty_like(dy);
    EmbedLayerNormBackward op{};
    op.sum = arguments.sum;
    op.num_chunks = partials.chunks;
    op.dy = dy.const_data_ptr();
    op.mean = row_statistics(mean, rows, "mean");
    op.rstd = row_statistics(rstd, rows, "rstd");
    op.weight = parameter(weight, width, "weight");
    op.dropout = dropout_of(rng_state, keys, stream, threshold, rows);
    op.dz = dz.mutable_data_ptr();
    op.partials = partials.data();
    const int64_t chunk_bytes = 16 * width * std::max<int64_t>(1, rows / partials.chunks);
    parallel_rows(partials.chunks, chunk_bytes,
                  [&, kernel = VLK_CPU(embed_layer_norm_backward)](int64_t begin, int64_t end) {
                      kernel(op, begin, end);
                  });
    return {dz, partials.sum(0, weight), partials.sum(1, bias)};
}

// The rows of `ids[:, column]` in the order of their ids, equal ids in the order of the rows (a counting
// sort).
void sort_rows(const int32_t* ids, int64_t rows, int64_t stride, int64_t num_ids, std::vector<int32_t>& first,
               std::vector<int32_t>& order) {
    first.assign(num_ids + 1, 0);
    order.resize(rows);
    for (int64_t row = 0; row < rows; ++row) {
        const int32_t id = ids[row * stride];
        STD_TORCH_CHECK(id < num_ids, "ids must be below ", num_ids, ", got ", id);
        if (id >= 0) ++first[id + 1];
    }
    for (int64_t id = 0; id < num_ids; ++id) first[id + 1] += first[id];
    std::vector<int32_t> next(first.begin(), first.end() - 1);
    for (int64_t row = 0; row < rows; ++row) {
        const int32_t id = ids[row * stride];
        if (id >= 0) order[next[id]++] = static_cast<int32_t>(row);
    }
}

Tensor scatter_to_table(const Tensor& gradient, const Tensor& ids, int64_t column, int64_t table_rows) {
    check_contiguous(gradient, "gradient");
    const int64_t rows = gradient.size(0), width = gradient.size(1), stride = ids.size(1);
    const int32_t* all_ids = read<int32_t>(ids, ScalarType::Int, "ids");
    STD_TORCH_CHECK(ids.size(0) == rows && 0 <= column && column < stride, "ids must be [rows, tables]");
    std::vector<int32_t> first, order;
    sort_rows(all_ids + column, rows, stride, table_rows, first, order);
    Tensor table = torch::stable::new_empty(gradient, {table_rows, width});
    const TableGradient op{
        dtype_of(gradient, "gradient"), width, gradient.const_data_ptr(), first.data(), order.data(),
        table.mutable_data_ptr()};
    const int64_t blocks = table_rows * ((width + table_block_columns - 1) / table_block_columns);
    const int64_t block_bytes = 8 * table_block_columns * (1 + rows / std::max<int64_t>(1, table_rows));
    parallel_rows(blocks, block_bytes, [&, kernel = VLK_CPU(table_gradient)](int64_t begin, int64_t end) {
        kernel(op, begin, end);
    });
    return table;
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels, CPU, m) {
    m.impl("embed_layer_norm_forward", TORCH_BOX(&forward));
    m.impl("embed_layer_norm_backward", TORCH_BOX(&backward));
    m.impl("embed_layer_norm_table_backward", TORCH_BOX(&scatter_to_table));
}

}  // namespace
}  // namespace vlk
