// What a step of attention is about: its rows, what they see, what dropout keeps. Include from *_cpu.cpp
// files only (see cpu_isa.h).
#pragma once
#include "attention/attention_cpu.h"
#include "primitives/cpu_matrix.h"

namespace vlk::VLK_ISA {

struct Span {
    int64_t start, length;
};

inline Span span_of(const Samples& samples, int64_t sample) {
    const int64_t at = sample * samples.segments;
    int64_t length = 0;
    for (int64_t s = 0; s < samples.segments; ++s) length += samples.lengths[at + s];
    return {samples.starts[at], length};
}

// Consecutive queries of one sample and its keys, the same for all heads. Long samples are taken in steps of
// queries, so that the scores of one step and head stay in the caches. The steps change no result: products
// continue the sums that earlier steps have left.
struct Pair {
    int64_t query_sample, first;  // `first` is the position in the sample of the first query
    Span queries, keys;
    int64_t columns;  // queries in whole registers: the row length of transposed matrices
    int64_t stride;   // of their rows
    bool masked;
};

constexpr int64_t step_scores = 1 << 15;
constexpr int64_t panel_queries = block_vectors * lanes;  // what a block of sums is wide

// Whole panels of queries, shared evenly among the steps of a sample; few keys bound the rows of a step.
inline int64_t queries_per_step(int64_t queries, int64_t keys) {
    const int64_t steps = queries * (keys > 64 ? keys : 64) / step_scores + 1;
    return round_up((queries + steps - 1) / steps, panel_queries);
}

// Rows an odd number of cache lines apart spread over the whole first cache.
constexpr int64_t line_floats = 16;
inline int64_t stride_of(int64_t columns) {
    return (round_up(columns, line_floats) / line_floats | 1) * line_floats;
}

// A byte per (key, query), 1 where the table lets the query see the key. False when all of them are.
inline bool fill_mask(const Attention& op, const Pair& pair, int64_t key_sample, uint8_t* mask) {
    const int32_t* query_lengths = op.queries.lengths + pair.query_sample * op.queries.segments;
    const int32_t* key_lengths = op.keys.lengths + key_sample * op.keys.segments;
    bool masked = false;
    __builtin_memset(mask, 0, pair.keys.length * pair.columns);
    int64_t query = -pair.first;  // where segment s begins in the step
    for (int64_t s = 0; s < op.queries.segments; query += query_lengths[s++]) {
        const int64_t stop = query + query_lengths[s], queries = pair.queries.length;
        const int64_t end = stop < queries ? stop : queries;
        if (end <= 0 || query >= end) continue;
        int64_t key = 0;
        for (int64_t t = 0; t < op.keys.segments; key += key_lengths[t++]) {
            const int32_t code = op.table[s * op.keys.segments + t];
            masked |= code != 1 && key_lengths[t] > 0;
            if (code == 0) continue;
            const int64_t ahead = static_cast<int64_t>(key_lengths[t]) - query_lengths[s];
            for (int64_t j = 0; j < key_lengths[t]; ++j) {
                const int64_t release = query + (code == 2 && j > ahead ? j - ahead : 0);
                const int64_t begin = release > 0 ? release : 0;
                if (begin < end) __builtin_memset(mask + (key + j) * pair.columns + begin, 1, end - begin);
            }
        }
    }
    return masked;
}

// The draws of dropout for one pair and head: words [groups of 16 keys][4][queries].
class Draws {
  public:
    Draws(const Attention& op, int64_t most_words)
        : dropout_(op.dropout), words_(dropout_.threshold ? most_words : 0) {
        if (dropout_.threshold) key_ = philox_key(dropout_.state);
    }

    void draw(int32_t sample_id, int64_t head, const Pair& pair) {
        if (!dropout_.threshold) return;
        columns_ = pair.columns;
        const uint32_t sample = static_cast<uint32_t>(sample_id);
        const uint32_t site = (static_cast<uint32_t>(dropout_.stream) << 16) + static_cast<uint32_t>(head);
        const PhiloxKey key = key_;
        const uint32_t first = static_cast<uint32_t>(pair.first);
        const int queries = static_cast<int>(columns_);
        for (int64_t group = 0; group * columns_per_draw < pair.keys.length; ++group) {
            uint32_t* x = words_.get() + group * 4 * columns_;
            uint32_t *y = x + columns_, *z = y + columns_, *w = z + columns_;
            const uint32_t column = static_cast<uint32_t>(group);
#pragma omp simd
            for (int query = 0; query < queries; ++query) {
                const PhiloxWords drawn =
                    philox({column, first + static_cast<uint32_t>(query), sample, site}, key);
                x[query] = drawn.x;
                y[query] = drawn.y;
                z[query] = drawn.z;
                w[query] = drawn.w;
            }
        }
    }

    explicit operator bool() const { return dropout_.threshold != 0; }
    float scale() const { return keep_scale(dropout_); }

    // The value where the pair (key, query) is kept, else 0.
    Floats apply(Floats value, int64_t key, int64_t query) const {
        const Words word = load_as<Words>(words_.get() + key / 4 * columns_ + query);
        const Words drawn = (word >> static_cast<uint32_t>(key % 4 * 8)) & 255u;
        return drawn >= static_cast<uint32_t>(dropout_.threshold) ? value : Floats{};
    }

  private:
    const Dropout dropout_;
    PhiloxKey key_{};
    int64_t columns_ = 0;
    Scratch<uint32_t> words_;
};

}  // namespace vlk::VLK_ISA
