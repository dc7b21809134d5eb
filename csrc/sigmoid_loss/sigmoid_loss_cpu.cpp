// Losses of a tile of pairs and their derivatives in one pass, while a register of similarities is there.
#include "sigmoid_loss/sigmoid_loss_cpu.h"

#include "primitives/cpu_matrix.h"

namespace vlk::VLK_ISA {
namespace {

// log(1 + e) = e P(e) for 0 <= e <= 1, off by 3e-8 of itself: losses near zero keep their digits.
inline Floats log_one_plus(Floats e) {
    Floats p = e * 0.005253458f - 0.029588507f;
    p = p * e + 0.07836167f;
    p = p * e - 0.1367477f;
    p = p * e + 0.1911143f;
    p = p * e - 0.2484437f;
    p = p * e + 0.3331927f;
    p = p * e - 0.49999502f;
    p = p * e + 1.0f;
    return p * e;
}

inline Floats with_signs(Floats value, Words signs) { return cast_bits<Floats>(cast_bits<Words>(value) ^ signs); }

inline Floats magnitude(Floats value) { return cast_bits<Floats>(cast_bits<Words>(value) & 0x7fffffffu); }

inline Words load_ids(const int32_t* ids, Whole) { return load_as<Words>(ids); }

inline Words load_ids(const int32_t* ids, Part part) {
    int32_t padded[lanes] = {};
    std::memcpy(padded, ids, part.count * sizeof(int32_t));
    return load_as<Words>(padded);
}

template <bool gradient>
void weigh_row(const SigmoidTile& op, int64_t row) {
    float* const similarities = op.tile + row * op.columns;
    const Words own = Words{} + static_cast<uint32_t>(op.row_ids[row]);
    RowSum losses, aligned, derivatives;
    for_chunks(op.columns, [&](int64_t column, auto chunk, int k) {
        const Floats similarity = load(similarities + column, chunk);
        // Logits are negated where the pair is positive, so that its loss is log(1 + exp(logit)).
        const Words positive = cast_bits<Words>(load_ids(op.column_ids + column, chunk) == own);
        const Words signs = positive & 0x80000000u;
        const Floats logit = with_signs(similarity * op.scale + op.bias, signs);
        const Floats small = exponential(-magnitude(logit));
        const Floats loss = (logit > 0.0f ? logit : Floats{}) + log_one_plus(small);
        losses.partial[k] += zero_past_end(loss, chunk);
        if constexpr (gradient) {
            const Floats derivative = with_signs((logit > 0.0f ? Floats{} + 1.0f : small) / (1.0f + small), signs);
            const Floats weight = store(similarities + column, derivative, chunk);
            aligned.partial[k] += weight * similarity;
            derivatives.partial[k] += weight;
        }
    });
    float* sums = op.sums + 3 * row;
    sums[0] = losses.total(), sums[1] = aligned.total(), sums[2] = derivatives.total();
}

}  // namespace

void weigh_pairs(const SigmoidTile& op, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        if (op.gradient) {
            weigh_row<true>(op, row);
        } else {
            weigh_row<false>(op, row);
        }
    }
}

}  // namespace vlk::VLK_ISA
