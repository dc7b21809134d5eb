// The CUDA kernels of the gradients of tables: a table row is the sum of its tokens' rows of the gradient, in the
// order of the tokens, and is written once, zeros where it has none. A warp sums a slab of columns of a row. Rows with
// more tokens than a chunk are left to the chunks: each writes its piece as a partial row, and a block adds the pieces.
#pragma once
#include "embed_layer_norm/table_gradients.h"
#include "primitives/device_sort.cuh"
#include "primitives/device_vector.cuh"

namespace vlk {

// The sort's input: pair i is table i % num_tables of token i / num_tables.
struct TokenRows {
    Ids ids;
    int64_t id_stride, num_tables;
    int64_t column[most_tables];
    int32_t first_row[most_tables + 1];

    __device__ __forceinline__ int32_t key(int64_t i) const {
        const int table = static_cast<int>(i % num_tables);
        const int64_t id = id_at(ids, i / num_tables * id_stride + column[table]);
        if (id < 0) return first_row[num_tables];
        VLK_REQUIRE(id < first_row[table + 1] - first_row[table], "ids of embed_layer_norm must be rows of their tables");
        return first_row[table] + static_cast<int32_t>(id);
    }
    __device__ __forceinline__ int32_t value(int64_t i) const { return static_cast<int32_t>(i / num_tables); }
};

// The tokens of row r stand at [first[r], first[r + 1]) of `sorted`.
struct TableSums {
    TableGradients op;
    Pairs sorted;
    int32_t* first;
    int64_t rows, chunk, chunks;

    __device__ __forceinline__ int count(int row) const { return first[row + 1] - first[row]; }
    __device__ __forceinline__ bool is_long(int row) const { return count(row) > chunk; }
    // Where chunk c's piece of a row goes: a chunk has pieces of two long rows at most, the first of which began before.
    __device__ __forceinline__ float* piece(int64_t c, int row) const {
        const int64_t slot = first[row] <= c * chunk ? 0 : 1;
        return op.partials + (2 * c + slot) * op.width;
    }
};

constexpr int table_warps = 8;    // of a block
constexpr int piece_warps = 16;   // that add the pieces of a row
constexpr int find_threads = 256;

template <int V>
__device__ __forceinline__ int slab_column() {
    return static_cast<int>(blockIdx.y * warp_threads + threadIdx.x) * V;
}

// first[r] = how many pairs have a key below r: a search for every row.
__global__ void __launch_bounds__(find_threads) find_rows_kernel(const __grid_constant__ TableSums sums) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * find_threads + threadIdx.x;
    if (row > sums.rows) return;
    int64_t low = 0, high = sums.op.tokens * sums.op.num_tables;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (sums.sorted.keys[middle] < row)
            low = middle + 1;
        else
            high = middle;
    }
    sums.first[row] = static_cast<int32_t>(low);
}

// Adds the gradient's rows of the sorted tokens [first, last), one after another; four are asked for at once, and the
// tokens of the next four with them.
template <typename T, int V>
__device__ __forceinline__ void add_tokens(const TableSums& sums, int first, int last, int column, float (&sum)[V]) {
    constexpr int at_once = 4;
    const int64_t width = sums.op.width;
    if (column >= width) return;
    const T* gradient = static_cast<const T*>(sums.op.gradient) + column;
    const auto token_at = [&](int i) { return i < last ? sums.sorted.values[i] : -1; };
    int token[at_once];
#pragma unroll
    for (int j = 0; j < at_once; ++j) token[j] = token_at(first + j);
#pragma unroll 1
    for (int next = first + at_once; token[0] >= 0; next += at_once) {
        Vector<T, V> rows[at_once];
#pragma unroll
        for (int j = 0; j < at_once; ++j) {
            rows[j] = token[j] >= 0 ? load_vector<T, V>(gradient + token[j] * width) : Vector<T, V>{};
            token[j] = token_at(next + j);
        }
#pragma unroll
        for (int j = 0; j < at_once; ++j) {
#pragma unroll
            for (int k = 0; k < V; ++k) sum[k] += to_float(rows[j].at[k]);
        }
    }
}

template <typename T, int V>
__device__ __forceinline__ void write_table_row(const TableSums& sums, int row, int column, const float (&sum)[V]) {
    int table = 0;
    while (row >= sums.op.first_row[table + 1]) ++table;
    T* to = static_cast<T*>(sums.op.table[table]) + (row - sums.op.first_row[table]) * sums.op.width + column;
    if (column < sums.op.width) store_vector(to, narrow<T, V>(sum));
}

template <typename T, int V>
__global__ void __launch_bounds__(table_warps* warp_threads)
    table_rows_kernel(const __grid_constant__ TableSums sums) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * table_warps + threadIdx.y;
    if (row >= sums.rows || sums.is_long(static_cast<int>(row))) return;
    const int own = static_cast<int>(row), column = slab_column<V>();
    float sum[V] = {};
    add_tokens<T, V>(sums, sums.first[own], sums.first[own + 1], column, sum);
    write_table_row<T, V>(sums, own, column, sum);
}

// V floats, by as few accesses as they take.
template <int V>
__device__ __forceinline__ void store_floats(float* to, const float (&values)[V]) {
    constexpr int width = V < 4 ? V : 4;
#pragma unroll
    for (int first = 0; first < V; first += width) {
        Vector<float, width> stored;
#pragma unroll
        for (int i = 0; i < width; ++i) stored.at[i] = values[first + i];
        store_vector(to + first, stored);
    }
}

// What chunk c holds of one long row.
template <typename T, int V>
__device__ __forceinline__ void write_piece(const TableSums& sums, int64_t c, int row, int first, int last) {
    const int column = slab_column<V>();
    float sum[V] = {};
    add_tokens<T, V>(sums, first, last, column, sum);
    if (column < sums.op.width) store_floats<V>(sums.piece(c, row) + column, sum);
}

template <typename T, int V>
__global__ void __launch_bounds__(table_warps* warp_threads)
    table_pieces_kernel(const __grid_constant__ TableSums sums) {
    const int64_t c = static_cast<int64_t>(blockIdx.x) * table_warps + threadIdx.y;
    const int64_t begin = c * sums.chunk, present = sums.first[sums.rows];
    if (begin >= present) return;
    const int64_t end = begin + sums.chunk < present ? begin + sums.chunk : present;
    const int first_row = sums.sorted.keys[begin], last_row = sums.sorted.keys[end - 1];
    if (sums.is_long(first_row)) {
        const int64_t behind = sums.first[first_row + 1];
        write_piece<T, V>(sums, c, first_row, static_cast<int>(begin), static_cast<int>(behind < end ? behind : end));
    }
    if (last_row != first_row && sums.is_long(last_row))
        write_piece<T, V>(sums, c, last_row, sums.first[last_row], static_cast<int>(end));
}

// Block (c, slab): the long row that begins in chunk c, if there is one. Each warp adds every 16th piece.
template <typename T, int V>
__global__ void __launch_bounds__(piece_warps* warp_threads)
    long_rows_kernel(const __grid_constant__ TableSums sums) {
    VLK_SHARED(float, of_warps, [piece_warps][warp_threads * V]);
    const int64_t begin = blockIdx.x * sums.chunk, present = sums.first[sums.rows];
    if (begin >= present) return;
    const int64_t end = begin + sums.chunk < present ? begin + sums.chunk : present;
    const int row = sums.sorted.keys[end - 1], column = slab_column<V>();
    if (!sums.is_long(row) || sums.first[row] < begin) return;
    const int64_t last_chunk = (sums.first[row + 1] - 1) / sums.chunk;
    float sum[V] = {};
    if (column < sums.op.width)
#pragma unroll 2  // of more, single columns spill on sm_100
        for (int64_t c = blockIdx.x + threadIdx.y; c <= last_chunk; c += piece_warps) {
            float piece[V];
            load_floats<float, V>(sums.piece(c, row) + column, piece);
#pragma unroll
            for (int k = 0; k < V; ++k) sum[k] += piece[k];
        }
#pragma unroll
    for (int k = 0; k < V; ++k) of_warps[threadIdx.y][k * warp_threads + threadIdx.x] = sum[k];
    __syncthreads();
    if (threadIdx.y != 0) return;
    for (int warp = 1; warp < piece_warps; ++warp) {
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] += of_warps[warp][k * warp_threads + threadIdx.x];
    }
    write_table_row<T, V>(sums, row, column, sum);
}

// Brings the tokens of every row together.
template <typename Launch>
TableSums launch_sort_tokens(const TableGradients& op, const TablePlan& plan, const Launch& launch) {
    TokenRows tokens{op.ids, op.id_stride, op.num_tables, {}, {}};
    for (int64_t k = 0; k < op.num_tables; ++k) tokens.column[k] = op.column[k];
    for (int64_t k = 0; k <= op.num_tables; ++k) tokens.first_row[k] = op.first_row[k];
    const int64_t count = plan.sort.count;
    const Pairs one{op.integers, op.integers + count}, other{op.integers + 2 * count, op.integers + 3 * count};
    int32_t* counts = op.integers + 4 * count;
    TableSums sums{op, {}, counts + sort_counts(plan.sort), plan.rows, plan.chunk, plan.chunks};
    sums.sorted = launch_sort(plan.sort, tokens, one, other, counts, launch);
    launch(find_rows_kernel, dim3(static_cast<unsigned>(plan.rows / find_threads + 1)), dim3(find_threads), int64_t{0}, sums);
    return sums;
}

template <typename T, int V, typename Launch>
void launch_table_sums(const TableSums& sums, const TablePlan& plan, const Launch& launch) {
    const unsigned slabs = static_cast<unsigned>(plan.slabs);
    const auto blocks = [](int64_t warps) { return static_cast<unsigned>((warps + table_warps - 1) / table_warps); };
    const dim3 block(warp_threads, table_warps);
    launch(table_rows_kernel<T, V>, dim3(blocks(plan.rows), slabs), block, int64_t{0}, sums);
    if (plan.chunks == 0) return;
    launch(table_pieces_kernel<T, V>, dim3(blocks(plan.chunks), slabs), block, int64_t{0}, sums);
    launch(long_rows_kernel<T, V>, dim3(static_cast<unsigned>(plan.chunks), slabs), dim3(warp_threads, piece_warps),
           int64_t{0}, sums);
}

template <typename Launch>
void launch_table_gradients(const TableGradients& op, const Launch& launch) {
    const TablePlan plan = plan_table_gradients(op);
    if (plan.rows == 0 || plan.slabs == 0) return;
    const TableSums sums = launch_sort_tokens(op, plan, launch);
    visit_element(op.dtype, [&](auto element) {
        using T = decltype(element);
        if (plan.columns == 1)
            launch_table_sums<T, 1>(sums, plan, launch);
        else
            launch_table_sums<T, access_bytes / sizeof(T)>(sums, plan, launch);
    });
}

}  // namespace vlk
