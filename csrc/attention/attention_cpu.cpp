// A work item is a sample and a key head. Scores are held transposed, [keys, queries]: the softmax of sixteen
// queries then runs down the lanes of a register, without sums across them, and the draws of dropout and the
// mask come in the same order.
#include "attention/attention_cpu.h"

#include "primitives/cpu_matrix.h"

namespace vlk::VLK_ISA {
namespace {

struct Span {
    int64_t start, length;
};

Span span_of(const Samples& samples, int64_t sample) {
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
    bool masked;
};

constexpr int64_t step_scores = 1 << 14;

int64_t queries_per_step(const Attention& op) {
    const int64_t most = step_scores / (op.longest_key + 1) / lanes * lanes;
    const int64_t needed = round_up(op.longest_query, lanes);
    return most < lanes ? lanes : most < needed ? most : needed;
}

// A byte per (key, query), 1 where the table lets the query see the key. False when all of them are.
bool fill_mask(const Attention& op, const Pair& pair, int64_t key_sample, uint8_t* mask) {
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
    Draws(const Attention& op, int64_t columns)
        : dropout_(op.dropout),
          groups_((op.longest_key + columns_per_draw - 1) / columns_per_draw),
          words_(dropout_.threshold ? groups_ * 4 * columns : 0) {
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
    int64_t groups_, columns_ = 0;
    Scratch<uint32_t> words_;
};

// What both directions share. Memory is for the longest sample of the call.
template <typename T>
class Worker {
  public:
    explicit Worker(const Attention& op)
        : op(op),
          padded_width(round_up(op.width, lanes)),
          step(queries_per_step(op)),
          draws(op, step),
          mask_(op.longest_key * step) {}

    // work(pair) for every step of a sample. The mask is built when the pair changes, not for each head.
    template <typename Work>
    void for_steps(int64_t query_sample, const Work& work) {
        const Span queries = span_of(op.queries, query_sample);
        for (int64_t first = 0; first < queries.length; first += step) {
            const bool is_open = pair_.query_sample == query_sample && pair_.first == first;
            if (!is_open) open(query_sample, queries, first);
            work(pair_);
        }
    }

    // The rows of one head as floats that can be read in whole registers: in place, or copied.
    Rows floats(const HeadRows& from, Span span, int64_t head, const Scratch<float>& copy) const {
        const T* data = static_cast<const T*>(from.data) + span.start * from.row + head * from.head;
        if constexpr (sizeof(T) == sizeof(float)) {
            if (op.width % lanes == 0) return {data, from.row};
        }
        for (int64_t row = 0; row < span.length; ++row) {
            for_chunks(op.width, [&](int64_t column, auto chunk, int) {
                const Floats value = load(data + row * from.row + column, chunk);
                store(copy.get() + row * padded_width + column, value, Whole{});
            });
        }
        return {copy.get(), padded_width};
    }

    // to[row] = factor(row) * from[row], [rows, padded width].
    template <typename Factor>
    void write(const HeadRows& to, Span span, int64_t head, const float* from, const Factor& factor) const {
        T* data = static_cast<T*>(to.data) + span.start * to.row + head * to.head;
        for (int64_t row = 0; row < span.length; ++row) {
            const float by = factor(row);
            for_chunks(op.width, [&](int64_t column, auto chunk, int) {
                store(data + row * to.row + column, by * load(from + row * padded_width + column, Whole{}),
                      chunk);
            });
        }
    }

    void write_zeros(const HeadRows& to, Span span, int64_t head) const {
        T* data = static_cast<T*>(to.data) + span.start * to.row + head * to.head;
        for (int64_t row = 0; row < span.length; ++row)
            __builtin_memset(data + row * to.row, 0, op.width * sizeof(T));
    }

    Floats visible(Floats score, Floats hidden, int64_t key, int64_t query) const {
        const Words shown = widen(load_as<Bytes>(mask_.get() + key * pair_.columns + query));
        return shown != 0u ? score : hidden;
    }

    int64_t group() const { return op.heads / op.key_heads; }
    float* lse(int64_t head, Span span) const { return op.lse + head * op.lse_stride + span.start; }

    const Attention& op;
    const int64_t padded_width, step;
    Draws draws;

  private:
    void open(int64_t query_sample, Span queries, int64_t first) {
        const int64_t rest = queries.length - first, key_sample = op.sources[query_sample];
        pair_ = {query_sample, first, {queries.start + first, rest < step ? rest : step}, {}, 0, false};
        pair_.keys = span_of(op.keys, key_sample);
        pair_.columns = round_up(pair_.queries.length, lanes);
        pair_.masked = fill_mask(op, pair_, key_sample, mask_.get());
    }

    Pair pair_{-1, 0, {}, {}, 0, false};
    Scratch<uint8_t> mask_;
};

// work(vector, chunk) for the registers of queries.
template <typename Work>
inline void for_queries(int64_t queries, const Work& work) {
    int64_t query = 0;
    for (; query + lanes <= queries; query += lanes) work(query, Whole{});
    if (query < queries) work(query, Part{static_cast<int>(queries - query)});
}

template <typename T>
class Forward : Worker<T> {
  public:
    explicit Forward(const AttentionForward& op)
        : Worker<T>(op),
          out_(op.out),
          q_(this->step * this->padded_width),
          k_(op.longest_key * this->padded_width),
          v_(op.longest_key * this->padded_width),
          turned_q_(this->padded_width * this->step),
          scores_(op.longest_key * this->step),
          sums_(this->step * this->padded_width),
          factors_(this->step) {}

    void run(int64_t query_sample, int64_t key_head) {
        const Attention& op = this->op;
        const Span keys = span_of(op.keys, op.sources[query_sample]);
        const Rows k = this->floats(op.k, keys, key_head, k_);
        const Rows v = this->floats(op.v, keys, key_head, v_);
        const int64_t group = this->group();
        this->for_steps(query_sample, [&](const Pair& pair) {
            for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
                attend(pair, head, k, v);
        });
    }

  private:
    void attend(const Pair& pair, int64_t head, Rows k, Rows v) {
        const Attention& op = this->op;
        const int64_t queries = pair.queries.length, keys = pair.keys.length, width = this->padded_width;
        const Rows q = this->floats(op.q, pair.queries, head, q_);
        transpose(q, queries, op.width, op.scale, turned_q_.get(), pair.columns);
        const Rows scores{scores_.get(), pair.columns};
        multiply(as_left(k), {turned_q_.get(), pair.columns}, keys, op.width, pair.columns, scores_.get(),
                 pair.columns);
        this->draws.draw(op.sample_ids[pair.query_sample], head, pair);
        softmax(pair, this->lse(head, pair.queries));
        multiply(transposed(scores), v, queries, keys, width, sums_.get(), width);
        this->write(out_, pair.queries, head, sums_.get(), [&](int64_t row) { return factors_.get()[row]; });
    }

    // Turns scores into exp(score - largest), with zeros for what is hidden or dropped, and leaves in
    // factors_ what the sums over them are to be multiplied by.
    void softmax(const Pair& pair, float* lse) {
        for_queries(pair.queries.length, [&](int64_t query, auto chunk) {
            float* scores = scores_.get() + query;
            Floats largest = Floats{} - __builtin_inff();
            for (int64_t key = 0; key < pair.keys.length; ++key) {
                Floats score = load(scores + key * pair.columns, Whole{});
                if (pair.masked) {
                    score = this->visible(score, Floats{} - __builtin_inff(), key, query);
                    store(scores + key * pair.columns, score, Whole{});
                }
                largest = score > largest ? score : largest;
            }
            largest = largest == -__builtin_inff() ? Floats{} : largest;
            Floats sum{};
            for (int64_t key = 0; key < pair.keys.length; ++key) {
                Floats p = exponential(load(scores + key * pair.columns, Whole{}) - largest);
                sum += p;
                if (this->draws) p = this->draws.apply(p, key, query);
                store(scores + key * pair.columns, p, Whole{});
            }
            Floats logarithm{};
            for (int lane = 0; lane < lanes; ++lane) logarithm[lane] = __builtin_logf(sum[lane]);
            store(lse + query, largest + logarithm, chunk);
            store(factors_.get() + query, sum == 0.0f ? Floats{} : this->draws.scale() / sum, Whole{});
        });
    }

    const HeadRows out_;
    Scratch<float> q_, k_, v_, turned_q_, scores_, sums_, factors_;
};

template <typename T>
class Backward : Worker<T> {
  public:
    explicit Backward(const AttentionBackward& op)
        : Worker<T>(op),
          backward_(op),
          q_(this->step * this->padded_width),
          k_(op.longest_key * this->padded_width),
          v_(op.longest_key * this->padded_width),
          grad_(this->step * this->padded_width),
          turned_q_(this->padded_width * this->step),
          turned_grad_(this->padded_width * this->step),
          probabilities_(op.longest_key * this->step),
          slopes_(op.longest_key * this->step),
          dq_(this->step * this->padded_width),
          dk_(op.longest_key * this->padded_width),
          dv_(op.longest_key * this->padded_width) {}

    void run(int64_t key_sample, int64_t key_head) {
        const Attention& op = this->op;
        const Span keys = span_of(op.keys, key_sample);
        const Rows k = this->floats(op.k, keys, key_head, k_);
        const Rows v = this->floats(op.v, keys, key_head, v_);
        const int64_t group = this->group();
        bool read = false;
        for (int64_t i = backward_.first[key_sample]; i < backward_.first[key_sample + 1]; ++i) {
            this->for_steps(backward_.readers[i], [&](const Pair& pair) {
                for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
                    differentiate(pair, head, k, v, read);
                    read = true;
                }
            });
        }
        if (!read) {
            this->write_zeros(backward_.dk, keys, key_head);
            this->write_zeros(backward_.dv, keys, key_head);
            return;
        }
        this->write(backward_.dk, keys, key_head, dk_.get(), [&](int64_t) { return op.scale; });
        this->write(backward_.dv, keys, key_head, dv_.get(), [](int64_t) { return 1.0f; });
    }

  private:
    // Writes dq of one head and puts its share into dk_ and dv_, which earlier heads may have begun.
    void differentiate(const Pair& pair, int64_t head, Rows k, Rows v, bool add) {
        const Attention& op = this->op;
        const int64_t queries = pair.queries.length, keys = pair.keys.length, width = this->padded_width;
        const Rows q = this->floats(op.q, pair.queries, head, q_);
        const Rows grad = this->floats(backward_.grad_out, pair.queries, head, grad_);
        transpose(q, queries, op.width, op.scale, turned_q_.get(), pair.columns);
        transpose(grad, queries, op.width, 1.0f, turned_grad_.get(), pair.columns);
        const Rows probabilities{probabilities_.get(), pair.columns}, slopes{slopes_.get(), pair.columns};
        multiply(as_left(k), {turned_q_.get(), pair.columns}, keys, op.width, pair.columns,
                 probabilities_.get(), pair.columns);
        multiply(as_left(v), {turned_grad_.get(), pair.columns}, keys, op.width, pair.columns,
                 slopes_.get(), pair.columns);
        this->draws.draw(op.sample_ids[pair.query_sample], head, pair);
        softmax(pair, head);
        multiply(as_left(probabilities), grad, keys, queries, width, dv_.get(), width, add);
        multiply(as_left(slopes), q, keys, queries, width, dk_.get(), width, add);
        multiply(transposed(slopes), k, queries, keys, width, dq_.get(), width);
        this->write(backward_.dq, pair.queries, head, dq_.get(), [&](int64_t) { return op.scale; });
    }

    // probabilities_: scores -> D P; slopes_: d out . v -> the gradient of the scores.
    void softmax(const Pair& pair, int64_t head) {
        const float* lse = this->lse(head, pair.queries);
        const float* grad_lse = backward_.grad_lse;
        if (grad_lse) grad_lse += head * this->op.lse_stride + pair.queries.start;
        for_queries(pair.queries.length, [&](int64_t query, auto chunk) {
            float *probabilities = probabilities_.get() + query, *slopes = slopes_.get() + query;
            const Floats offset = load(lse + query, chunk);
            const float scale = this->draws.scale();
            Floats delta{};
            for (int64_t key = 0; key < pair.keys.length; ++key) {
                float *score = probabilities + key * pair.columns, *slope = slopes + key * pair.columns;
                Floats p = exponential(load(score, Whole{}) - offset), d = load(slope, Whole{});
                if (pair.masked) p = this->visible(p, Floats{}, key, query);
                if (this->draws) store(slope, d = scale * this->draws.apply(d, key, query), Whole{});
                delta += p * d;
                store(score, p, Whole{});
            }
            if (grad_lse) delta -= load(grad_lse + query, chunk);
            for (int64_t key = 0; key < pair.keys.length; ++key) {
                float *score = probabilities + key * pair.columns, *slope = slopes + key * pair.columns;
                const Floats p = load(score, Whole{});
                store(slope, p * (load(slope, Whole{}) - delta), Whole{});
                if (this->draws) store(score, scale * this->draws.apply(p, key, query), Whole{});
            }
        });
    }

    const AttentionBackward& backward_;
    Scratch<float> q_, k_, v_, grad_, turned_q_, turned_grad_, probabilities_, slopes_, dq_, dk_, dv_;
};

template <template <typename> class Direction, typename Op>
void run_items(const Op& op, int64_t begin, int64_t end) {
    visit(op.dtype, [&](auto element) {
        Direction<decltype(element)> direction(op);
        for (int64_t item = begin; item < end; ++item)
            direction.run(item / op.key_heads, item % op.key_heads);
    });
}

}  // namespace

void attention_forward(const AttentionForward& op, int64_t begin, int64_t end) {
    run_items<Forward>(op, begin, end);
}

void attention_backward(const AttentionBackward& op, int64_t begin, int64_t end) {
    run_items<Backward>(op, begin, end);
}

}  // namespace vlk::VLK_ISA
