#include "embed_layer_norm/embed_layer_norm_cpu.h"

#include <array>

#include "binding/norm.h"
#include "embed_layer_norm/embed_layer_norm_plan.h"

#ifdef VLK_WITH_CUDA
#include "binding/cuda.h"
#include "embed_layer_norm/embed_layer_norm_cuda.h"
#endif

namespace vlk {
namespace {

Ids ids_of(const Tensor& tensor, int64_t numel, const char* name) {
    const bool wide = tensor.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(wide || tensor.scalar_type() == ScalarType::Int, name, " must be int32 or int64");
    check_numel(tensor, numel, name);
    check_contiguous(tensor, name);
    return {tensor.const_data_ptr(), wide};
}

// Of `rows` ids that lie `stride` apart, all must be -1 or below `count`.
template <typename... Name>
void check_ids_below(int64_t count, Ids ids, int64_t rows, int64_t stride, int64_t column, const Name&... name) {
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t id = id_at(ids, row * stride + column);
        STD_TORCH_CHECK(-1 <= id && id < count, name..., " must be -1 or below ", count, ", got ", id);
    }
}

// Checked views of the arguments that make z; owns the lists that `sum` shows.
struct SumArguments {
    EmbeddingSum sum{};
    std::vector<const void*> pointers;
    std::vector<int64_t> table_rows;

    SumArguments(const Tensor& like, int64_t rows, const OptionalTensor& ids,
                 const std::vector<Tensor>& tables, const OptionalTensor& dense) {
        STD_TORCH_CHECK(like.dim() == 2, "rows must be [rows, width], got ", like.dim(), " dimensions");
        const int64_t width = like.size(1), count = static_cast<int64_t>(tables.size());
        for (const Tensor& table : tables) {
            check_type(table, like.scalar_type(), "tables");
            check_contiguous(table, "tables");
            check_same_device(like, {table});
            STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == width, "tables must be [V, ", width, "]");
            pointers.push_back(table.const_data_ptr());
            table_rows.push_back(table.size(0));
        }
        STD_TORCH_CHECK(ids.has_value() || count == 0, "tables need ids");
        if (dense) {
            check_type(*dense, like.scalar_type(), "dense");
            check_numel(*dense, rows * width, "dense");
            check_contiguous(*dense, "dense");
        }
        sum.dtype = dtype_of(like, "tables");
        sum.width = width;
        sum.rows = rows;
        sum.num_tables = count;
        if (count) sum.ids = ids_of(*ids, rows * count, "ids");
        sum.tables = pointers.data();
        sum.table_rows = table_rows.data();
        sum.dense = data_or_null(dense);
    }
};

RowNorms row_norms(const OptionalTensor& norm_ids, const OptionalTensor& weight, int64_t rows) {
    if (!norm_ids) return {{}, 1};
    STD_TORCH_CHECK(weight.has_value() && weight->dim() == 2, "norm_ids need a weight [norms, width]");
    return {ids_of(*norm_ids, rows, "norm_ids"), weight->size(0)};
}

// A kernel reads no foreign memory: on a CPU ids are looked at here, on a card by the kernels themselves.
void check_ids(const EmbeddingSum& sum, const RowNorms& norms) {
    for (int64_t table = 0; table < sum.num_tables; ++table)
        check_ids_below(sum.table_rows[table], sum.ids, sum.rows, sum.num_tables, table, "ids[:, ", table, "]");
    if (norms.ids.data) check_ids_below(norms.count, norms.ids, sum.rows, 1, 0, "norm_ids");
}

// The gradients of weight and bias; empty where there is no such parameter.
using ParameterGradients = std::array<Tensor, 2>;
using Parameters = std::array<OptionalTensor, 2>;

void forward_on_cpu(const EmbedLayerNormForward& op, const Tensor&) {
    check_ids(op.sum, op.norms);
    parallel_rows(op.sum.rows, 16 * op.sum.width,
                  [&, kernel = VLK_CPU(embed_layer_norm_forward)](int64_t begin, int64_t end) {
                      kernel(op, begin, end);
                  });
}

ParameterGradients backward_on_cpu(EmbedLayerNormBackward& op, const Tensor& dy, const Parameters& parameters) {
    check_ids(op.sum, op.norms);
    const ChunkSums sums(dy, op.sum.rows, 2, op.norms.count * op.sum.width);
    op.num_chunks = sums.chunks;
    op.partials = sums.data();
    const int64_t chunk_bytes = 16 * op.sum.width * std::max<int64_t>(1, op.sum.rows / sums.chunks);
    parallel_rows(sums.chunks, chunk_bytes,
                  [&, kernel = VLK_CPU(embed_layer_norm_backward)](int64_t begin, int64_t end) {
                      kernel(op, begin, end);
                  });
    return {sums.sum(0, parameters[0]), sums.sum(1, parameters[1])};
}

#ifdef VLK_WITH_CUDA
void check_served(const EmbeddingSum& sum, std::initializer_list<Parameter> parameters) {
    STD_TORCH_CHECK(sum.width <= widest_row, "rows must have at most ", widest_row, " columns, got ", sum.width);
    STD_TORCH_CHECK(sum.num_tables <= most_tables, "there must be at most ", most_tables, " tables, got ", sum.num_tables);
    for (const Parameter& parameter : parameters)
        STD_TORCH_CHECK(!parameter.data || parameter.dtype == Dtype::float32 || parameter.dtype == sum.dtype,
                        "parameters must have the dtype of the tables or float32");
}

void forward_on_cuda(const EmbedLayerNormForward& op, const Tensor& like) {
    check_served(op.sum, {op.weight, op.bias});
    const OnDeviceOf device(like);
    check_launch(embed_layer_norm_forward_cuda(op, device.stream()), "embed_layer_norm_forward");
}

ParameterGradients backward_on_cuda(EmbedLayerNormBackward& op, const Tensor& dy, const Parameters& parameters) {
    check_served(op.sum, {op.weight});
    const int64_t width = op.norms.count * op.sum.width;
    op.num_chunks = plan_embed_backward(op).blocks;
    const Tensor partials = new_float(dy, {op.num_chunks, 2, width});
    op.partials = static_cast<float*>(partials.mutable_data_ptr());
    PartialRows<2> sums{op.partials, op.num_chunks, width, {}};
    ParameterGradients gradients{new_float(dy, {0}), new_float(dy, {0})};
    for (int part = 0; part < 2; ++part) {
        if (!parameters[part]) continue;
        check_numel(*parameters[part], width, "parameter");
        check_contiguous(*parameters[part], "parameter");
        gradients[part] = torch::stable::empty_like(*parameters[part]);
        sums.gradients[part] = {gradients[part].mutable_data_ptr(), dtype_of(gradients[part], "parameter")};
    }
    const OnDeviceOf device(dy);
    check_launch(embed_layer_norm_backward_cuda(op, sums, device.stream()), "embed_layer_norm_backward");
    return gradients;
}
#endif

template <auto run>
std::tuple<Tensor, Tensor, Tensor> forward(const OptionalTensor& ids, const std::vector<Tensor>& tables,
                                           const OptionalTensor& dense, const OptionalTensor& weight,
                                           const OptionalTensor& bias, const OptionalTensor& norm_ids,
                                           const OptionalTensor& rng_state, const OptionalTensor& keys,
                                           int64_t stream, int64_t threshold, double eps) {
    STD_TORCH_CHECK(dense.has_value() || !tables.empty(), "there must be a table or a dense term");
    STD_TORCH_CHECK(ids.has_value() || tables.empty(), "tables need ids");
    const Tensor& like = dense ? *dense : tables[0];
    const int64_t rows = dense ? dense->size(0) : ids->size(0);
    check_same_device(like, {ids, weight, bias, norm_ids, rng_state, keys});
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
    run(op, like);
    return {y, mean, rstd};
}

template <auto run>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& mean, const Tensor& rstd,
                                            const OptionalTensor& ids, const std::vector<Tensor>& tables,
                                            const OptionalTensor& dense, const OptionalTensor& weight,
                                            const OptionalTensor& bias, const OptionalTensor& norm_ids,
                                            const OptionalTensor& rng_state, const OptionalTensor& keys,
                                            int64_t stream, int64_t threshold) {
    check_same_device(dy, {mean, rstd, ids, dense, weight, bias, norm_ids, rng_state, keys});
    check_contiguous(dy, "dy");
    const int64_t rows = dy.size(0);
    const SumArguments arguments(dy, rows, ids, tables, dense);
    const int64_t width = arguments.sum.width;
    const RowNorms norms = row_norms(norm_ids, weight, rows);
    Tensor dz = torch::stable::empty_like(dy);
    EmbedLayerNormBackward op{};
    op.sum = arguments.sum;
    op.norms = norms;
    op.dy = dy.const_data_ptr();
    op.mean = row_statistics(mean, rows, "mean");
    op.rstd = row_statistics(rstd, rows, "rstd");
    op.weight = parameter(weight, norms.count * width, "weight");
    op.dropout = dropout_of(rng_state, keys, stream, threshold, rows);
    op.dz = dz.mutable_data_ptr();
    const auto [dweight, dbias] = run(op, dy, {weight, bias});
    return {dz, dweight, dbias};
}

// The tokens in the order of their ids, equal ids in the order of the tokens (a counting sort).
struct Sorting {
    std::vector<int32_t> first, order;

    Sorting(TokenIds tokens, int64_t count, int64_t num_ids) : first(num_ids + 1), order(count + 1) {
        for (int64_t token = 0; token < count; ++token) {
            const int64_t id = id_of(tokens, token);
            if (id >= 0) ++first[id + 1];
        }
        for (int64_t id = 0; id < num_ids; ++id) first[id + 1] += first[id];
        std::vector<int32_t> next(first.begin(), first.end() - 1);
        for (int64_t token = 0; token < count; ++token) {
            const int64_t id = id_of(tokens, token);
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

// What a column of ids scatters into a table.
Tensor scatter_to_table(const Tensor& gradient, TokenIds tokens, int64_t table_rows) {
    const int64_t rows = gradient.size(0), width = gradient.size(1);
    constexpr int64_t stays_in_cache = (2 << 20) / sizeof(float);
    const bool small = table_rows * width <= stays_in_cache;
    STD_TORCH_CHECK(small || rows <= INT32_MAX, "ids must be at most ", INT32_MAX, ", got ", rows);  // they are sorted as int32
    check_ids_below(table_rows, tokens.ids, rows, tokens.stride, tokens.column, "ids");
    Tensor table = torch::stable::new_empty(gradient, {table_rows, width});
    const int64_t part_columns = columns_per_part(width);
    const TableGradient op{dtype_of(gradient, "gradient"), rows, width, table_rows, part_columns,
                           gradient.const_data_ptr(), table.mutable_data_ptr()};
    const int64_t parts = (width + part_columns - 1) / part_columns;
    if (small) {
        sum_small_table(op, tokens, parts);
    } else {
        sum_large_table(op, tokens, parts, rows_fill_cache_lines(table) && rows_fill_cache_lines(gradient));
    }
    return table;
}

std::vector<Tensor> tables_on_cpu(const Tensor& gradient, Ids ids, int64_t stride,
                                  const std::vector<int64_t>& columns, const std::vector<int64_t>& table_rows) {
    std::vector<Tensor> tables;
    for (size_t k = 0; k < columns.size(); ++k)
        tables.push_back(scatter_to_table(gradient, {ids, stride, columns[k]}, table_rows[k]));
    return tables;
}

#ifdef VLK_WITH_CUDA
std::vector<Tensor> tables_on_cuda(const Tensor& gradient, Ids ids, int64_t stride,
                                   const std::vector<int64_t>& columns, const std::vector<int64_t>& table_rows) {
    constexpr int64_t most = INT32_MAX;
    TableGradients op{};
    op.num_tables = static_cast<int64_t>(columns.size());
    STD_TORCH_CHECK(op.num_tables <= most_tables, "there must be at most ", most_tables, " tables, got ", op.num_tables);
    op.dtype = dtype_of(gradient, "gradient");
    op.tokens = gradient.size(0);
    op.width = gradient.size(1);
    op.ids = ids;
    op.id_stride = stride;
    op.gradient = gradient.const_data_ptr();
    STD_TORCH_CHECK(op.tokens * op.num_tables <= most, "ids must be at most ", most, ", got ", op.tokens * op.num_tables);
    std::vector<Tensor> tables;
    for (int64_t k = 0, rows = 0; k < op.num_tables; ++k) {
        tables.push_back(torch::stable::new_empty(gradient, {table_rows[k], op.width}));
        op.table[k] = tables[k].mutable_data_ptr();
        op.column[k] = columns[k];
        rows += table_rows[k];
        STD_TORCH_CHECK(rows <= most, "the tables must have at most ", most, " rows in all, got ", rows);
        op.first_row[k + 1] = static_cast<int32_t>(rows);
    }
    const TablePlan plan = plan_table_gradients(op);
    const Tensor integers = torch::stable::new_empty(gradient, {plan.integers}, std::make_optional(ScalarType::Int));
    const Tensor partials = new_float(gradient, {plan.floats});
    op.integers = static_cast<int32_t*>(integers.mutable_data_ptr());
    op.partials = static_cast<float*>(partials.mutable_data_ptr());
    const OnDeviceOf device(gradient);
    check_launch(table_gradients_cuda(op, device.stream()), "embed_layer_norm_tables_backward");
    return tables;
}
#endif

template <auto run>
std::vector<Tensor> scatter_to_tables(const Tensor& gradient, const Tensor& ids, std::vector<int64_t> columns,
                                      std::vector<int64_t> table_rows) {
    check_same_device(gradient, {ids});
    check_contiguous(gradient, "gradient");
    STD_TORCH_CHECK(gradient.dim() == 2 && ids.dim() == 2 && ids.size(0) == gradient.size(0) &&
                        columns.size() == table_rows.size(),
                    "gradient must be [rows, width], ids [rows, tables], and every column must have its rows");
    const int64_t stride = ids.size(1);
    for (const int64_t column : columns)
        STD_TORCH_CHECK(0 <= column && column < stride, "columns must be below ", stride, ", got ", column);
    return run(gradient, ids_of(ids, ids.numel(), "ids"), stride, columns, table_rows);
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels, CPU, m) {
    m.impl("embed_layer_norm_forward", TORCH_BOX(&forward<forward_on_cpu>));
    m.impl("embed_layer_norm_backward", TORCH_BOX(&backward<backward_on_cpu>));
    m.impl("embed_layer_norm_tables_backward", TORCH_BOX(&scatter_to_tables<tables_on_cpu>));
}

#ifdef VLK_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(vlkernels, CUDA, m) {
    m.impl("embed_layer_norm_forward", TORCH_BOX(&forward<forward_on_cuda>));
    m.impl("embed_layer_norm_backward", TORCH_BOX(&backward<backward_on_cuda>));
    m.impl("embed_layer_norm_tables_backward", TORCH_BOX(&scatter_to_tables<tables_on_cuda>));
}
#endif

}  // namespace
}  // namespace vlk
