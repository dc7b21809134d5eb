// A work item is a sample and a key head. Scores are held transposed, [keys, queries]: the softmax of sixteen
// queries then runs down the lanes of a register, without sums across them, and the draws of dropout and the
// mask come in the same order.
#include "attention/attention_cpu.h"

#include "attention/worker.h"

namespace vlk::VLK_ISA {
namespace {

template <typename T>
class Forward : Worker<T> {
  public:
    explicit Forward(const AttentionForward& op)
        : Worker<T>(op),
          out_(op.out),
          q_(this->longest_step * this->stride),
          k_(op.longest_key * this->stride),
          v_(op.longest_key * this->stride),
          turned_q_(this->stride * stride_of(this->longest_step)),
          scores_(this->most_scores),
          sums_(this->longest_step * this->stride),
          lse_(this->longest_step),
          factors_(this->longest_step) {}

    void run(Item item, Item next) {
        const Attention& op = this->op;
        const Span keys = span_of(op.keys, op.sources[item.sample]);
        const Rows k = this->floats(op.k, keys, item.key_head, k_);
        const Rows v = this->floats(op.v, keys, item.key_head, v_);
        const int64_t heads = (item.key_head + 1) * this->group();
        this->for_steps(item.sample, [&](const Pair& pair, bool is_last) {
            for (int64_t head = heads - this->group(); head < heads; ++head) {
                look_ahead(pair, head, is_last && head + 1 == heads ? &next : nullptr);
                attend(pair, head, k, v);
            }
        });
    }

  private:
    // Fetches what this step will write and what the next one, or the next item, will read.
    void look_ahead(const Pair& pair, int64_t head, const Item* next) {
        const Attention& op = this->op;
        this->ahead.clear();
        this->fetch(out_, pair.queries, head);
        if (!next) return this->fetch(op.q, this->next_queries(pair), head);
        if (next->sample < 0) return;
        const Span keys = span_of(op.keys, op.sources[next->sample]);
        this->fetch(op.k, keys, next->key_head);
        this->fetch(op.q, this->first_queries(next->sample), next->key_head * this->group());
        this->fetch(op.v, keys, next->key_head);
    }

    void attend(const Pair& pair, int64_t head, Rows k, Rows v) {
        const Attention& op = this->op;
        const int64_t queries = pair.queries.length, keys = pair.keys.length, stride = this->stride;
        this->floats_turned(op.q, pair, head, q_, turned_q_);
        this->draws.draw(op.sample_ids[pair.query_sample], head, pair);
        for_panels(pair.columns, [&](int64_t column, auto panel) {
            this->multiply(as_left(k), {turned_q_.get() + column, pair.stride}, keys, op.width,
                           panel.vectors * lanes, scores_.get() + column, pair.stride);
            softmax(pair, column, panel);
        });
        __builtin_memcpy(this->lse(head, pair.queries), lse_.get(), queries * sizeof(float));
        this->multiply(transposed({scores_.get(), pair.stride}), v, queries, keys, this->width, sums_.get(),
                       stride);
        this->write(out_, pair.queries, head, sums_.get(), [&](int64_t row) { return factors_.get()[row]; });
    }

    // Turns scores into exp(score - largest), with zeros for what is hidden or dropped, and leaves in
    // factors_ what the sums over them are to be multiplied by.
    template <int count>
    void softmax(const Pair& pair, int64_t first, Panel<count>) {
        float* const scores = scores_.get() + first;
        Floats largest[count], sum[count] = {};
        for (Floats& x : largest) x = Floats{} - __builtin_inff();
        for (int64_t key = 0; key < pair.keys.length; ++key) {
            for (int r = 0; r < count; ++r) {
                float* at = scores + key * pair.stride + r * lanes;
                Floats score = this->op.scale * load(at, Whole{});
                if (pair.masked) {
                    score = this->visible(score, Floats{} - __builtin_inff(), key, first + r * lanes);
                    store(at, score, Whole{});
                }
                largest[r] = score > largest[r] ? score : largest[r];
            }
        }
        for (Floats& x : largest) x = x == -__builtin_inff() ? Floats{} : x;
        const float rest = pair.masked ? 1.0f : this->op.scale;  // hiding has left scaled scores
        for (int64_t key = 0; key < pair.keys.length; ++key) {
            for (int r = 0; r < count; ++r) {
                float* at = scores + key * pair.stride + r * lanes;
                Floats p = exponential(rest * load(at, Whole{}) - largest[r]);
                sum[r] += p;
                if (this->draws) p = this->draws.apply(p, key, first + r * lanes);
                store(at, p, Whole{});
            }
        }
        for (int r = 0; r < count; ++r) {
            const int64_t query = first + r * lanes;
            Floats logarithm{};
            for (int lane = 0; lane < lanes; ++lane) logarithm[lane] = __builtin_logf(sum[r][lane]);
            store(lse_.get() + query, largest[r] + logarithm, Whole{});
            store(factors_.get() + query, sum[r] == 0.0f ? Floats{} : this->draws.scale() / sum[r], Whole{});
        }
    }

    const HeadRows out_;
    Scratch<float> q_, k_, v_, turned_q_, scores_, sums_, lse_, factors_;
};

template <typename T>
class Backward : Worker<T> {
  public:
    explicit Backward(const AttentionBackward& op)
        : Worker<T>(op),
          backward_(op),
          q_(this->longest_step * this->stride),
          k_(op.longest_key * this->stride),
          v_(op.longest_key * this->stride),
          grad_(this->longest_step * this->stride),
          turned_q_(this->stride * stride_of(this->longest_step)),
          turned_grad_(this->stride * stride_of(this->longest_step)),
          probabilities_(this->most_scores),
          slopes_(this->most_scores),
          lse_(this->longest_step),
          grad_lse_(this->longest_step),
          dq_(this->longest_step * this->stride),
          dk_(op.longest_key * this->stride),
          dv_(op.longest_key * this->stride) {}

    void run(Item item, Item next) {
        const Attention& op = this->op;
        const Span keys = span_of(op.keys, item.sample);
        const Rows k = this->floats(op.k, keys, item.key_head, k_);
        const Rows v = this->floats(op.v, keys, item.key_head, v_);
        const int64_t heads = (item.key_head + 1) * this->group();
        const int64_t end = backward_.first[item.sample + 1];
        bool read = false;
        for (int64_t i = backward_.first[item.sample]; i < end; ++i) {
            this->for_steps(backward_.readers[i], [&](const Pair& pair, bool is_last) {
                for (int64_t head = heads - this->group(); head < heads; ++head) {
                    const bool ends = is_last && head + 1 == heads && i + 1 == end;
                    look_ahead(pair, head, item, ends ? &next : nullptr);
                    differentiate(pair, head, k, v, read);
                    read = true;
                }
            });
        }
        if (!read) {
            this->write_zeros(backward_.dk, keys, item.key_head);
            this->write_zeros(backward_.dv, keys, item.key_head);
            return;
        }
        this->write(backward_.dk, keys, item.key_head, dk_.get(), [&](int64_t) { return op.scale; });
        this->write(backward_.dv, keys, item.key_head, dv_.get(), [](int64_t) { return 1.0f; });
    }

  private:
    void look_ahead(const Pair& pair, int64_t head, Item item, const Item* next) {
        const Attention& op = this->op;
        this->ahead.clear();
        this->fetch(backward_.dq, pair.queries, head);
        if (!next) {
            this->fetch(op.q, this->next_queries(pair), head);
            this->fetch(backward_.grad_out, this->next_queries(pair), head);
            return;
        }
        const Span own = span_of(op.keys, item.sample);
        this->fetch(backward_.dk, own, item.key_head);
        this->fetch(backward_.dv, own, item.key_head);
        if (next->sample < 0) return;
        const Span keys = span_of(op.keys, next->sample);
        this->fetch(op.k, keys, next->key_head);
        this->fetch(op.v, keys, next->key_head);
        const int64_t reader = backward_.first[next->sample];
        if (reader == backward_.first[next->sample + 1]) return;
        const Span queries = this->first_queries(backward_.readers[reader]);
        this->fetch(op.q, queries, next->key_head * this->group());
        this->fetch(backward_.grad_out, queries, next->key_head * this->group());
    }

    // Writes dq of one head and puts its share into dk_ and dv_, which earlier heads may have begun.
    void differentiate(const Pair& pair, int64_t head, Rows k, Rows v, bool add) {
        const Attention& op = this->op;
        const int64_t queries = pair.queries.length, keys = pair.keys.length;
        const int64_t width = this->width, stride = this->stride;
        const Rows q = this->floats_turned(op.q, pair, head, q_, turned_q_);
        const Rows grad = this->floats_turned(backward_.grad_out, pair, head, grad_, turned_grad_);
        this->draws.draw(op.sample_ids[pair.query_sample], head, pair);
        read_statistics(pair, head);
        for_panels(pair.columns, [&](int64_t column, auto panel) {
            this->multiply(as_left(k), {turned_q_.get() + column, pair.stride}, keys, op.width,
                           panel.vectors * lanes, probabilities_.get() + column, pair.stride);
            this->multiply(as_left(v), {turned_grad_.get() + column, pair.stride}, keys, op.width,
                           panel.vectors * lanes, slopes_.get() + column, pair.stride);
            softmax(pair, column, panel);
        });
        const Rows probabilities{probabilities_.get(), pair.stride}, slopes{slopes_.get(), pair.stride};
        this->multiply(as_left(probabilities), grad, keys, queries, width, dv_.get(), stride, add);
        this->multiply(as_left(slopes), q, keys, queries, width, dk_.get(), stride, add);
        this->multiply(transposed(slopes), k, queries, keys, width, dq_.get(), stride);
        this->write(backward_.dq, pair.queries, head, dq_.get(), [&](int64_t) { return op.scale; });
    }

    void read_statistics(const Pair& pair, int64_t head) {
        const int64_t bytes = pair.queries.length * sizeof(float);
        __builtin_memcpy(lse_.get(), this->lse(head, pair.queries), bytes);
        if (!backward_.grad_lse) return;
        const float* from = backward_.grad_lse + head * this->op.lse_stride + pair.queries.start;
        __builtin_memcpy(grad_lse_.get(), from, bytes);
    }

    // probabilities_: scores -> D P; slopes_: d out . v -> the gradient of the scores.
    template <int count>
    void softmax(const Pair& pair, int64_t first, Panel<count>) {
        const float scale = this->draws.scale();
        Floats offset[count], delta[count] = {};
        for (int r = 0; r < count; ++r) offset[r] = load(lse_.get() + first + r * lanes, Whole{});
        for (int64_t key = 0; key < pair.keys.length; ++key) {
            for (int r = 0; r < count; ++r) {
                const int64_t query = first + r * lanes, at = key * pair.stride + query;
                Floats p = exponential(this->op.scale * load(probabilities_.get() + at, Whole{}) - offset[r]);
                Floats d = load(slopes_.get() + at, Whole{});
                if (pair.masked) p = this->visible(p, Floats{}, key, query);
                if (this->draws) {
                    store(slopes_.get() + at, d = scale * this->draws.apply(d, key, query), Whole{});
                }
                delta[r] += p * d;
                store(probabilities_.get() + at, p, Whole{});
            }
        }
        if (backward_.grad_lse) {
            for (int r = 0; r < count; ++r) delta[r] -= load(grad_lse_.get() + first + r * lanes, Whole{});
        }
        for (int64_t key = 0; key < pair.keys.length; ++key) {
            for (int r = 0; r < count; ++r) {
                const int64_t query = first + r * lanes, at = key * pair.stride + query;
                const Floats p = load(probabilities_.get() + at, Whole{});
                store(slopes_.get() + at, p * (load(slopes_.get() + at, Whole{}) - delta[r]), Whole{});
                if (this->draws) {
                    store(probabilities_.get() + at, scale * this->draws.apply(p, key, query), Whole{});
                }
            }
        }
    }

    const AttentionBackward& backward_;
    Scratch<float> q_, k_, v_, grad_, turned_q_, turned_grad_, probabilities_, slopes_, lse_, grad_lse_;
    Scratch<float> dq_, dk_, dv_;
};

// The items a thread takes, one after the other.
class Taken {
  public:
    explicit Taken(const Items& items) : items_(items) {}

    Item next(int64_t key_heads) {
        if (at_ == end_) {
            const int64_t share = items_.next->fetch_add(1, std::memory_order_relaxed);
            if (share >= items_.shares) return {-1, 0};
            at_ = items_.bounds[share];
            end_ = items_.bounds[share + 1];
        }
        const int64_t item = at_++;
        return {items_.samples[item / key_heads], item % key_heads};
    }

  private:
    const Items& items_;
    int64_t at_ = 0, end_ = 0;
};

template <template <typename> class Direction, typename Op>
void run_items(const Op& op, const Items& items) {
    visit(op.dtype, [&](auto element) {
        Taken taken(items);
        Item item = taken.next(op.key_heads);
        if (item.sample < 0) return;
        Direction<decltype(element)> direction(op);
        while (item.sample >= 0) {
            const Item next = taken.next(op.key_heads);
            direction.run(item, next);
            item = next;
        }
    });
}

}  // namespace

void attention_forward(const AttentionForward& op, const Items& items) { run_items<Forward>(op, items); }

void attention_backward(const AttentionBackward& op, const Items& items) { run_items<Backward>(op, items); }

}  // namespace vlk::VLK_ISA
