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
            const int64_t id = id_at(op_.ids, row * op_.num_tables + table);
            if (id >= 0) terms_.get()[count++] = static_cast<const T*>(op_.tables[table]) + id * op_.width;
        }
        if (op_.dense) terms_.get()[count++] = static_cast<const T*>(op_.dense) + row * op_.width;
        return count;
    }

    const EmbeddingSum& op_;
    Scratch<const T*> terms_;
};

// One norm's row of a parameter; null stays null.
inline const float* row_of(const FloatParameter& parameter, int64_t norm, int64_t width) {
    return parameter.get() ? parameter.get() + norm * width : nullptr;
}

template <typename T>
void forward_rows(const EmbedLayerNormForward& op, int64_t first_row, int64_t last_row) {
    const int64_t width = op.sum.width;
    const FloatParameter weights(op.weight, op.norms.count * width), biases(op.bias, op.norms.count * width);
    const float scale = keep_scale(op.dropout);
    DropoutRow dropped(op.dropout, width);
    RowTerms<T> terms(op.sum);
    Scratch<float> z(width);
    for (int64_t row = first_row; row < last_row; ++row) {
        T* y = static_cast<T*>(op.y) + row * width;
        const int64_t norm = norm_of(op.norms, row);
        if (norm < 0) {
            op.mean[row] = op.rstd[row] = 0.0f;
            std::memset(y, 0, width * sizeof(T));
            continue;
        }
        const Moments m = moments(z.get(), terms.write_sum(row, z.get()), width, op.eps);
        op.mean[row] = m.mean;
        op.rstd[row] = m.rstd;
        if (op.dropout.threshold) dropped.draw(row);
        const float* weight = row_of(weights, norm, width);
        const float* bias = row_of(biases, norm, width);
        for_chunks(width, [&](int64_t column, auto chunk, int) {
            Floats value = normalised(load(z.get() + column, chunk), m, weight, bias, column, chunk);
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
    const int64_t width = op.sum.width, all_norms = op.norms.count * width;
    const FloatParameter weights(op.weight, all_norms);
    DropoutRow dropped(op.dropout, width);
    RowTerms<T> terms(op.sum);
    Scratch<float> z(width), dy(width);
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
        float* dweights = op.partials + chunk * 2 * all_norms;
        std::memset(dweights, 0, 2 * all_norms * sizeof(float));
        const int64_t last_row = chunk_start(chunk + 1, op.num_chunks, op.sum.rows);
        for (int64_t row = chunk_start(chunk, op.num_chunks, op.sum.rows); row < last_row; ++row) {
            const int64_t norm = norm_of(op.norms, row);
            if (norm < 0) {
                std::memset(static_cast<T*>(op.dz) + row * width, 0, width * sizeof(T));
                continue;
            }
            float* dweight = dweights + norm * width;
            backward_row<T>(op, row_of(weights, norm, width), dropped, terms, row, z.get(), dy.get(), dweight,
                            dweight + all_norms);
        }
    }
}

// Columns [start, start + width) of a table's gradient.
struct Columns {
    int64_t start, width;
};

inline Columns columns_of(const TableGradient& op, int64_t part) {
    const int64_t start = part * op.part_columns, left = op.width - start;
    return {start, left < op.part_columns ? left : op.part_columns};
}

template <typename T>
inline void add_row(float* sum, const T* row, int64_t width) {
    for_chunks(width, [&](int64_t column, auto chunk, int) {
        store(sum + column, load(sum + column, chunk) + load(row + column, chunk), chunk);
    });
}

template <typename To, typename From>
inline void convert_row(To* to, const From* from, int64_t width) {
    for_chunks(width, [&](int64_t column, auto chunk, int) {
        store(to + column, load(from + column, chunk), chunk);
    });
}

template <typename T>
void small_table_parts(const TableGradient& op, TokenIds tokens, int64_t first_part, int64_t last_part) {
    const Scratch<float> sums(op.table_rows * op.part_columns);
    for (int64_t index = first_part; index < last_part; ++index) {
        const Columns part = columns_of(op, index);
        const T* gradient = static_cast<const T*>(op.gradient) + part.start;
        T* table = static_cast<T*>(op.table) + part.start;
        std::memset(sums.get(), 0, op.table_rows * part.width * sizeof(float));
        for (int64_t token = 0; token < op.tokens; ++token) {
            const int64_t id = id_of(tokens, token);
            if (id >= 0) add_row(sums.get() + id * part.width, gradient + token * op.width, part.width);
        }
        for (int64_t row = 0; row < op.table_rows; ++row)
            convert_row(table + row * op.width, sums.get() + row * part.width, part.width);
    }
}

// Asks for a row that is read soon: sorted tokens lie where no processor would guess.
template <typename T>
inline void prefetch_row(const T* row, int64_t width) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t column = 0; column < width; column += line) __builtin_prefetch(row + column);
}

// Where the columns of one table row's gradient stand: in the tokens' own row when there is but one, in
// `rounded` when several were added.
template <typename T>
const T* summed_tokens(const T* gradient, const int32_t* order, int32_t count, int64_t stride, int64_t width,
                       float* sum, T* rounded) {
    const T* first = gradient + order[0] * stride;
    prefetch_row(gradient + order[1] * stride, width);
    if (count == 1) return first;
    convert_row(sum, first, width);
    for (int32_t entry = 1; entry < count; ++entry) {
        prefetch_row(gradient + order[entry + 1] * stride, width);
        add_row(sum, gradient + order[entry] * stride, width);
    }
    convert_row(rounded, sum, width);
    return rounded;
}

template <typename T>
void large_table_blocks(const TableGradient& op, SortedTokens tokens, int64_t first_block,
                        int64_t last_block) {
    const Scratch<float> sum(op.part_columns);
    const Scratch<T> rounded(op.part_columns), zeros(op.part_columns);
    std::memset(zeros.get(), 0, op.part_columns * sizeof(T));
    for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t row = block % op.table_rows;
        const Columns part = columns_of(op, block / op.table_rows);
        const T* gradient = static_cast<const T*>(op.gradient) + part.start;
        T* to = static_cast<T*>(op.table) + row * op.width + part.start;
        const int32_t first = tokens.first[row], count = tokens.first[row + 1] - first;
        const T* from = zeros.get();
        if (count)
            from = summed_tokens(gradient, tokens.order + first, count, op.width, part.width, sum.get(),
                                 rounded.get());
        if (tokens.stream) {
            stream(to, from, part.width * sizeof(T));
        } else {
            std::memcpy(to, from, part.width * sizeof(T));
        }
    }
    if (tokens.stream) finish_streams();
}

}  // namespace

void embed_layer_norm_forward(const EmbedLayerNormForward& op, int64_t first_row, int64_t last_row) {
    visit(op.sum.dtype, [&](auto element) { forward_rows<decltype(element)>(op, first_row, last_row); });
}

void embed_layer_norm_backward(const EmbedLayerNormBackward& op, int64_t first_chunk, int64_t last_chunk) {
    visit(op.sum.dtype,
          [&](auto element) { backward_chunks<decltype(element)>(op, first_chunk, last_chunk); });
}

void small_table_gradient(const TableGradient& op, TokenIds tokens, int64_t first_part, int64_t last_part) {
    visit(op.dtype, [&](auto element) {
        small_table_parts<decltype(element)>(op, tokens, first_part, last_part);
    });
}

void large_table_gradient(const TableGradient& op, SortedTokens tokens, int64_t first_block,
                          int64_t last_block) {
    visit(op.dtype, [&](auto element) {
        large_table_blocks<decltype(element)>(op, tokens, first_block, last_block);
    });
}

}  // namespace vlk::VLK_ISA
