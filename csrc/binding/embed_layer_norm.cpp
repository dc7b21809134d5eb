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
        STD_TORCH_CHECK(like.dim() == 2, "rows must be [rows, width], got ", like.dim(), " dimensions");
        const int64_t width = like.size(1), count = static_cast<int64_t>(tables.size());
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

RowNorms row_norms(const OptionalTensor& norm_ids, const OptionalTensor& weight, int64_t rows) {
    if (!norm_ids) return {nullptr, 1};
    STD_TORCH_CHECK(weight.has_value() && weight->dim() == 2, "norm_ids need a weight [norms, width]");
    check_numel(*norm_ids, rows, "norm_ids");
    const int32_t* ids = read<int32_t>(*norm_ids, ScalarType::Int, "norm_ids");
    const int64_t count = weight->size(0);
    for (int64_t row = 0; row < rows; ++row)
        STD_TORCH_CHECK(ids[row] < count, "norm_ids must be below ", count, ", got ", ids[row]);
    return {ids, count};
}

std::tuple<Tensor, Tensor, Tensor> forward(const OptionalTensor& ids, const std::vector<Tensor>& tables,
                                           const OptionalTensor& dense, const OptionalTensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& norm_ids,
                                           const OptionalTensor& rng_state, const OptionalTensor& keys,
                                           int64_t stream, int64_t threshold, double eps) {
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
    op.norms = row_norms(norm_ids, weight, rows);
    op.eps = static_cast<float>(eps);
    op.weight = parameter(weight, op.norms.count * width, "weight");
    op.bias = parameter(bias, op.norms.count * width, "bias");
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
                                            const OptionalTensor& bias, const OptionalTensor& norm_ids,
                                            const OptionalTensor& rng_state, const OptionalTensor& keys,
                                            int64_t stream, int64_t threshold) {
    check_contiguous(dy, "dy");
    const int64_t rows = dy.size(0);
    const SumArguments arguments(dy, rows, ids, tables, dense);
    const int64_t width = arguments.sum.width;
    const RowNorms norms = row_norms(norm_ids, weight, rows);
    const ChunkSums partials(dy, rows, 2, norms.count * width);
    Tensor dz = torch::stable::empty_like(dy);
    EmbedLayerNormBackward op{};
    op.sum = arguments.sum;
    op.norms = norms;
    op.num_chunks = partials.chunks;
    op.dy = dy.const_data_ptr();
    op.mean = row_statistics(mean, rows, "mean");
    op.rstd = row_statistics(rstd, rows, "rstd");
    op.weight = parameter(weight, norms.count * width, "weight");
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

// The tokens in the order of their ids, equal ids in the order of the tokens (a counting sort).
struct Sorting {
    std::vector<int32_t> first, order;

    Sorting(TokenIds tokens, int64_t count, int64_t num_ids) : first(num_ids + 1), order(count + 1) {
        for (int64_t token = 0; token < count; ++token) {
            const int32_t id = tokens.ids[token * tokens.stride];
            if (id >= 0) ++first[id + 1];
        }
        for (int64_t id = 0; id < num_ids; ++id) first[id + 1] += first[id];
        std::vector<int32_t> next(first.begin(), first.end() - 1);
        for (int64_t token = 0; token < count; ++token) {
            const int32_t id = tokens.ids[token * tokens.stride];
            if (id >= 0) order[next[id]++] = static_cast<int32_t>(token);
        }
    }
};

// The columns of a table that a thread sums at a time. The fewer parts, the longer the runs in which the
// gradient is read; whole cache lines in any dtype, so that no two threads write to one.
int64_t columns_per_part(int64_t width) {
    constexpr int64_t fewest = 128, unit = 64;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t parts = std::max<int64_t>(1, std::min(threads, width / fewest));
    return std::max(unit, (width / parts + unit - 1) / unit * unit);
}

void sum_small_table(const TableGradient& op, TokenIds tokens, int64_t parts) {
    parallel_rows(parts, 4 * op.part_columns * (op.tokens + op.table_rows),
                  [&, kernel = VLK_CPU(small_table_gradient)](int64_t begin, int64_t end) {
                      kernel(op, tokens, begin, end);
                  });
}

void sum_large_table(const TableGradient& op, TokenIds tokens, int64_t parts, bool whole_lines) {
    const Sorting sorting(tokens, op.tokens, op.table_rows);
    const SortedTokens sorted{sorting.first.data(), sorting.order.data(), whole_lines};
    parallel_rows(parts * op.table_rows, 8 * op.part_columns * (1 + op.tokens / op.table_rows),
                  [&, kernel = VLK_CPU(large_table_gradient)](int64_t begin, int64_t end) {
                      kernel(op, sorted, begin, end);
                  });
}

Tensor scatter_to_table(const Tensor& gradient, const Tensor& ids, int64_t column, int64_t table_rows) {
    check_contiguous(gradient, "gradient");
    const int64_t rows = gradient.size(0), width = gradient.size(1), stride = ids.size(1);
    STD_TORCH_CHECK(ids.size(0) == rows && 0 <= column && column < stride, "ids must be [rows, tables]");
    const TokenIds tokens{read<int32_t>(ids, ScalarType::Int, "ids") + column, stride};
    for (int64_t row = 0; row < rows; ++row) {
        const int32_t id = tokens.ids[row * stride];
        STD_TORCH_CHECK(id < table_rows, "ids must be below ", table_rows, ", got ", id);
    }
    Tensor table = torch::stable::new_empty(gradient, {table_rows, width});
    const int64_t part_columns = columns_per_part(width);
    const TableGradient op{dtype_of(gradient, "gradient"), rows, width, table_rows, part_columns,
                           gradient.const_data_ptr(), table.mutable_data_ptr()};
    const int64_t parts = (width + part_columns - 1) / part_columns;
    constexpr int64_t stays_in_cache = (2 << 20) / sizeof(float);
    if (table_rows * width <= stays_in_cache) {
        sum_small_table(op, tokens, parts);
    } else {
        sum_large_table(op, tokens, parts, rows_fill_cache_lines(table) && rows_fill_cache_lines(gradient));
    }
    return table;
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels, CPU, m) {
    m.impl("embed_layer_norm_forward", TORCH_BOX(&forward));
    m.impl("embed_layer_norm_backward", TORCH_BOX(&backward));
    m.impl("embed_layer_norm_table_backward", TORCH_BOX(&scatter_to_table));
}

}  // namespace
}  // namespace vlk
