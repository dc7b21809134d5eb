#include "embed_layer_norm/embed_layer_norm_cpu.h"

#include "primitives/cpu_norm.h"

namespace vlk::VLK_ISA {
namespace {

// The rows that add up to one row of z, and their sum.
template <typename T>
class RowTerms {
  public:
    explicit RowTerms(const EmbeddingSum& op) : op_(op), terms_(op.num_tables + 1) {}

    // Writes z and returns the sum over its columns.
    float write_sum(int64_t row, float* z) {
        const int64_t count = gather(row);
        RowSum sum;
        for_chunks(op_.width, [&](int64_t column, auto chunk, int k) {
            Floats value{};
            for (int64_t term = 0; term < count; ++term) value += load(terms_.get()[term] + column, chunk);
            store(z + column, value, chunk);
            sum.partial[k] += value;
        });
        return sum.total();
    }

  private:
    int64_t gather(int64_t row) {
        int64_t count = 0;
        for (int64_t table = 0; table < op_.num_tables; ++table) {
            const int64_t id = op_.ids[row * op_.num_tables + table];
            if (id >= 0) terms_.get()[count++] = static_cast<const T*>(op_.tables[table]) + id * op_.width;
        }
        if (op_.dense) terms_.get()[count++] = static_cast<const T*>(op_.dense) + row * op_.width;
        return count;
    }

    const EmbeddingSum& op_;
    Scratch<const T*> terms_;
};

template <typename T>
void forward_rows(const EmbedLayerNormForward& op, int64_t first_row, int64_t last_row) {
    const int64_t width = op.sum.width;
    const FloatParameter weight(op.weight, width), bias(op.bias, width);
    const float scale = keep_scale(op.dropout);
    DropoutRow dropped(op.dropout, width);
    RowTerms<T> terms(op.sum);
    Scratch<float> z(width);
    for (int64_t row = first_row; row < last_row; ++row) {
        const Moments m = moments(z.get(), terms.write_sum(row, z.get()), width, op.eps);
        op.mean[row] = m.mean;
        op.rstd[row] = m.rstd;
        if (op.dropout.threshold) dropped.draw(row);
        T* y = static_cast<T*>(op.y) + row * width;
        for_chunks(width, [&](int64_t column, auto chunk, int) {
            Floats value =
                normalised(load(z.get() + column, chunk), m, weight.get(), bias.get(), column, chunk);
            if (op.dropout.threshold) value = dropped.apply(value, column) * scale;
            store(y + column, value, chunk);
        });
    }
}

template <typename T>
void backward_row(const EmbedLayerNormBackward& op, const float* weight, DropoutRow& dropped,
                  RowTerms<T>& terms, int64_t row, float* z, float* dy, float* dweight, float* dbias) {
    const int64_t width = op.sum.width;
    const float scale = keep_scale(op.dropout);
    const T* upstream = static_cast<const T*>(op.dy) + row * width;
    if (op.dropout.threshold) dropped.draw(row);
    for_chunks(width, [&](int64_t column, auto chunk, int) {
        Floats value = load(upstream + column, chunk);
        if (op.dropout.threshold) value = dropped.apply(value, column) * scale;
        store(dy + column, value, chunk);
    });
    terms.write_sum(row, z);
    const Moments m{op.mean[row], op.rstd[row]};
    const Projection p = project(dy, z, m, weight, dweight, dbias, width);
    T* dz = static_cast<T*>(op.dz) + row * width;
    for_chunks(width, [&](int64_t column, auto chunk, int) {
        store(dz + column,
              norm_gradient(load(dy + column, chunk), load(z + column, chunk), m, p, weight, column, chunk),
              chunk);
    });
}

template <typename T>
void backward_chunks(const EmbedLayerNormBackward& op, int64_t first_chunk, int64_t last_chunk) {
    const int64_t width = op.sum.width;
    const FloatParameter weight(op.weight, width);
    DropoutRow dropped(op.dropout, width);
    RowTerms<T> terms(op.sum);
    Scratch<float> z(width), dy(width);
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
        float* dweight = op.partials + chunk * 2 * width;
        std::memset(dweight, 0, 2 * width * sizeof(float));
        const int64_t last_row = chunk_start(chunk + 1, op.num_chunks, op.sum.rows);
        for (int64_t row = chunk_start(chunk, op.num_chunks, op.sum.rows); row < last_row; ++row) {
            backward_row<T>(op, weight.get(), dropped, terms, row, z.get(), dy.get(), dweight,
                            dweight + width);
        }
    }
}

template <typename T>
void table_blocks(const TableGradient& op, int64_t first_block, int64_t last_block) {
    const int64_t blocks_per_row = (op.width + table_block_columns - 1) / table_block_columns;
    float sum[table_block_columns];
    for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t row = block / blocks_per_row, start = block % blocks_per_row * table_block_columns;
        const int64_t width = op.width - start < table_block_columns ? op.width - start : table_block_columns;
        T* to = static_cast<T*>(op.table) + row * op.width + start;
        if (op.first[row] == op.first[row + 1]) {
            std::memset(to, 0, width * sizeof(T));
            continue;
        }
        std::memset(sum, 0, sizeof sum);
        for (int32_t entry = op.first[row]; entry < op.first[row + 1]; ++entry) {
            const T* from = static_cast<const T*>(op.gradient) + op.order[entry] * op.width + start;
            for_chunks(width, [&](int64_t column, auto chunk, int) {
                store(sum + column, load(sum + column, chunk) + load(from + column, chunk), chunk);
            });
        }
        for_chunks(width, [&](int64_t column, auto chunk, int) {
            store(to + column, load(sum + column, chunk), chunk);
        });
    }
}

}  // namespace

void embed_layer_norm_forward(const EmbedLayerNormForward& op, int64_t first_row, int64_t last_row) {
    visit(op.sum.dtype, [&](auto element) { forward_rows<decltype(element)>(op, first_row, last_row); });
}

void embed_layer_norm_backward(const EmbedLayerNormBackward& op, int64_t first_chunk, int64_t last_chunk) {
    visit(op.sum.dtype,
          [&](auto element) { backward_chunks<decltype(element)>(op, first_chunk, last_chunk); });
}

void table_gradient(const TableGradient& op, int64_t first_block, int64_t last_block) {
    visit(op.dtype, [&](auto element) { table_blocks<decltype(element)>(op, first_block, last_block); });
}

}  // namespace vlk::VLK_ISA
