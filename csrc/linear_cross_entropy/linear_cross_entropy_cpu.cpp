// Statistics of logits and their derivatives, a register of rows of the batch at a time: no sum runs across a register.
#include "linear_cross_entropy/linear_cross_entropy_cpu.h"

#include "primitives/cpu_matrix.h"

namespace vlk::VLK_ISA {
namespace {

// As many entries as fit the registers beside their statistics: each logit comes from memory once.
constexpr int held = lanes == 16 ? 16 : 8;

constexpr float infinity = __builtin_inff();

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// What exponentials begin from where nothing but -inf was seen.
inline Floats finite(Floats largest) { return largest == -infinity ? Floats{} : largest; }

template <int count, typename T, typename Chunk>
inline void reduce_some(const LogitColumns& op, const T* logits, const float* bias, Chunk chunk, float* largest,
                        float* total, float* sum) {
    Floats logit[count];
    const Floats before = load(largest, chunk);
    Floats now = before;
#pragma GCC unroll 16
    for (int e = 0; e < count; ++e) {
        logit[e] = load(logits + e * op.rows, chunk);
        if (bias) logit[e] += bias[e];
        now = larger(logit[e], now);
    }
    const Floats origin = finite(now);
    Floats exponentials = load(total, chunk) * exponential(before - origin);
#pragma GCC unroll 16
    for (int e = 0; e < count; ++e) exponentials += exponential(logit[e] - origin);
    store(largest, now, chunk);
    store(total, exponentials, chunk);
    if (sum) {
        Floats logits_so_far = load(sum, chunk);
#pragma GCC unroll 16
        for (int e = 0; e < count; ++e) {
            const Floats product = load(logits + e * op.rows, chunk);
            logits_so_far += product == -infinity ? Floats{} : logit[e];
        }
        store(sum, logits_so_far, chunk);
    }
}

template <int count, typename T>
inline void reduce_entries(const LogitColumns& op, int64_t entry, float* largest, float* total, float* sum) {
    const T* logits = static_cast<const T*>(op.logits) + entry * op.rows;
    for_chunks(op.rows, [&](int64_t row, auto chunk, int) {
        reduce_some<count>(op, logits + row, op.bias ? op.bias + entry : nullptr, chunk, largest + row, total + row,
                           sum ? sum + row : nullptr);
    });
}

template <typename T>
void reduce_block(const LogitColumns& op, int64_t block) {
    float* const largest = op.largest + block * op.rows;
    float* const total = op.total + block * op.rows;
    float* const sum = op.sum ? op.sum + block * op.rows : nullptr;
    for (int64_t row = 0; row < op.rows; ++row) largest[row] = -infinity, total[row] = 0.0f;
    if (sum) std::memset(sum, 0, op.rows * sizeof(float));
    int64_t entry = block * entries_of_block;
    const int64_t end = smaller(entry + entries_of_block, op.entries);
    for (; entry + held <= end; entry += held) reduce_entries<held, T>(op, entry, largest, total, sum);
    for (; entry < end; ++entry) reduce_entries<1, T>(op, entry, largest, total, sum);
}

template <typename T>
void differentiate_entry(const LogitColumns& op, int64_t entry) {
    T* const logits = static_cast<T*>(op.logits) + entry * op.rows;
    const float bias = op.bias ? op.bias[entry] : 0.0f;
    RowSum derivatives;
    for_chunks(op.rows, [&](int64_t row, auto chunk, int k) {
        const Floats logit = load(logits + row, chunk) + bias;
        const Floats softmax = exponential(logit - load(op.shift + row, chunk));
        const Floats derivative = softmax * load(op.factor + row, chunk) - load(op.offset + row, chunk);
        store(logits + row, derivative, chunk);
        derivatives.partial[k] += zero_past_end(derivative, chunk);
    });
    op.over_rows[entry] = derivatives.total();
}

// A row, all blocks taken together; exponentials are from the largest logit.
struct Row {
    double largest, target, others, own, mean;

    double total() const { return others + own; }
    double log_total() const { return own == 1.0 ? __builtin_log1p(others) : __builtin_log(total()); }
    double log_sum() const { return largest + log_total(); }
};

Row join_blocks(const LogitColumns& op, int64_t row) {
    const double target = op.at_target[row];
    double largest = target, others = 0.0, sum = target;
    for (int64_t at = row; at < blocks_of(op) * op.rows; at += op.rows) {
        if (op.largest[at] > largest) largest = op.largest[at];
    }
    for (int64_t at = row; at < blocks_of(op) * op.rows; at += op.rows) {
        others += op.total[at] * __builtin_exp(op.largest[at] - largest);
        if (op.sum) sum += op.sum[at];
    }
    return {largest, target, others, __builtin_exp(target - largest), sum / static_cast<double>(op.entries)};
}

}  // namespace

void set_targets_apart(const LogitColumns& op) {
    visit(op.dtype, [&](auto element) {
        using T = decltype(element);
        for (int64_t row = 0; row < op.rows; ++row) {
            T& logit = static_cast<T*>(op.logits)[op.targets[row] * op.rows + row];
            op.at_target[row] = to_float(logit) + (op.bias ? op.bias[op.targets[row]] : 0.0f);
            logit = from_float<T>(-infinity);
        }
    });
}

void reduce_blocks(const LogitColumns& op, int64_t begin, int64_t end) {
    visit(op.dtype, [&](auto element) {
        for (int64_t block = begin; block < end; ++block) reduce_block<decltype(element)>(op, block);
    });
}

void find_losses(const LogitColumns& op, int64_t begin, int64_t end) {
    const double smoothing = op.label_smoothing, z_loss = op.z_loss;
    for (int64_t k = begin; k < end; ++k) {
        const Row row = join_blocks(op, k);
        double loss = (1.0 - smoothing) * (row.largest - row.target) + row.log_total();
        if (smoothing > 0.0) loss += smoothing * (row.largest - row.mean);
        if (z_loss > 0.0) loss += z_loss * row.log_sum() * row.log_sum();
        op.losses[k] = static_cast<float>(loss);
        const double cotangent = op.cotangents ? op.cotangents[k] : 1.0;
        const double of_log_sum = z_loss > 0.0 ? 2.0 * z_loss * row.log_sum() : 0.0;
        const double spread = smoothing / static_cast<double>(op.entries);
        op.shift[k] = static_cast<float>(row.largest);
        op.factor[k] = static_cast<float>(cotangent * (1.0 + of_log_sum) / row.total());
        op.offset[k] = static_cast<float>(cotangent * spread);
        op.at_target[k] = static_cast<float>(
            cotangent * ((of_log_sum * row.own - row.others) / row.total() + smoothing - spread));
    }
}

void differentiate_blocks(const LogitColumns& op, int64_t begin, int64_t end) {
    const int64_t last = smaller(end * entries_of_block, op.entries);
    visit(op.dtype, [&](auto element) {
        for (int64_t entry = begin * entries_of_block; entry < last; ++entry) {
            differentiate_entry<decltype(element)>(op, entry);
        }
    });
}

void put_targets_back(const LogitColumns& op) {
    visit(op.dtype, [&](auto element) {
        using T = decltype(element);
        for (int64_t row = 0; row < op.rows; ++row) {
            static_cast<T*>(op.logits)[op.targets[row] * op.rows + row] = from_float<T>(op.at_target[row]);
            op.over_rows[op.targets[row]] += op.at_target[row] + op.offset[row];
        }
    });
}

}  // namespace vlk::VLK_ISA
