// What both directions of attention share: rows in and out, steps over the queries, and looking ahead.
// Include from *_cpu.cpp files only (see cpu_isa.h).
#pragma once
#include "attention/pairs.h"

namespace vlk::VLK_ISA {

// Fetches rows into the second cache while products run, a few after every block of sums. The rows of a head
// lie pages apart, where the hardware does not look ahead.
class Ahead {
  public:
    explicit Ahead(int64_t row_bytes) : row_bytes_(row_bytes) {}

    void clear() { current_ = count_ = 0; }
    void add(const void* first, int64_t stride, int64_t rows) {
        if (rows > 0) streams_[count_++] = {static_cast<const char*>(first), stride, rows};
    }

    void fetch() {
        for (int row = 0; row < rows_at_once && current_ < count_; ++row) {
            Stream& stream = streams_[current_];
            for (int64_t byte = 0; byte < row_bytes_; byte += 64) {
                __builtin_prefetch(stream.next + byte, 0, 2);
            }
            stream.next += stream.stride;
            if (--stream.rows == 0) ++current_;
        }
    }

  private:
    struct Stream {
        const char* next;
        int64_t stride, rows;
    };
    static constexpr int rows_at_once = 8, most_streams = 7;

    const int64_t row_bytes_;
    int current_ = 0, count_ = 0;
    Stream streams_[most_streams];
};

struct Item {
    int64_t sample, key_head;  // sample -1: none
};

// What both directions share. Memory is for the longest sample of the call.
template <typename T>
class Worker {
  public:
    explicit Worker(const Attention& op)
        : op(op),
          width(round_up(op.width, lanes)),
          stride(stride_of(op.width)),
          longest_step(round_up(op.longest_query, panel_queries)),
          most_scores(scores_of(op)),
          draws(op, most_scores / 4 + 4 * longest_step),
          ahead(op.width * static_cast<int64_t>(sizeof(T))),
          mask_(most_scores) {
        const int64_t cells = op.queries.segments * op.keys.segments;
        for (int64_t cell = 0; cell < cells; ++cell) all_visible_ &= op.table[cell] == 1;
    }

    // work(pair) for every step of a sample. The mask is built when the pair changes, not for each head.
    template <typename Work>
    void for_steps(int64_t query_sample, const Work& work) {
        const Span queries = span_of(op.queries, query_sample);
        const Span keys = span_of(op.keys, op.sources[query_sample]);
        const int64_t step = queries_per_step(queries.length, keys.length);
        for (int64_t first = 0; first < queries.length; first += step) {
            const bool is_open = pair_.query_sample == query_sample && pair_.first == first;
            if (!is_open) open(query_sample, queries, keys, first, step);
            work(pair_, first + step >= queries.length);
        }
    }

    // The queries of the step after this one (none after the last), and of a sample's first one.
    Span next_queries(const Pair& pair) const {
        const Span all = span_of(op.queries, pair.query_sample);
        const int64_t end = pair.queries.start + pair.queries.length, rest = all.start + all.length - end;
        return {end, rest < pair.queries.length ? rest : pair.queries.length};
    }
    Span first_queries(int64_t query_sample) const {
        const Span all = span_of(op.queries, query_sample);
        const int64_t step = queries_per_step(all.length, span_of(op.keys, op.sources[query_sample]).length);
        return {all.start, all.length < step ? all.length : step};
    }

    // The rows of one head as floats, `stride` apart.
    Rows floats(const HeadRows& from, Span span, int64_t head, const Scratch<float>& copy) const {
        copy_rows(from, span, head, 0, span.length, copy.get());
        return {copy.get(), stride};
    }

    // The same of the queries, and turned: [width, queries], some rows at a time while they are near.
    Rows floats_turned(const HeadRows& from, const Pair& pair, int64_t head, const Scratch<float>& copy,
                       const Scratch<float>& turned) const {
        for (int64_t row = 0; row < pair.columns; row += lanes) {
            const int64_t end = row + lanes < pair.queries.length ? row + lanes : pair.queries.length;
            copy_rows(from, pair.queries, head, row, end, copy.get());
            transpose_rows<Floats>({copy.get(), stride}, row, pair.queries.length, op.width, turned.get(),
                                   pair.stride);
        }
        return {copy.get(), stride};
    }

    // to[row] = factor(row) * from[row]
    template <typename Factor>
    void write(const HeadRows& to, Span span, int64_t head, const float* from, const Factor& factor) const {
        T* data = rows_of<T>(to, span, head);
        for (int64_t row = 0; row < span.length; ++row) {
            const float by = factor(row);
            for_chunks(op.width, [&](int64_t column, auto chunk, int) {
                store(data + row * to.row + column, by * load(from + row * stride + column, Whole{}), chunk);
            });
        }
    }

    void write_zeros(const HeadRows& to, Span span, int64_t head) const {
        T* data = rows_of<T>(to, span, head);
        for (int64_t row = 0; row < span.length; ++row)
            __builtin_memset(data + row * to.row, 0, op.width * sizeof(T));
    }

    void fetch(const HeadRows& rows, Span span, int64_t head) {
        ahead.add(rows_of<T>(rows, span, head), rows.row * static_cast<int64_t>(sizeof(T)), span.length);
    }

    // out = (out +) left right, [rows, columns]
    void multiply(Left left, Rows right, int64_t rows, int64_t depth, int64_t columns, float* out,
                  int64_t out_stride, bool add = false) {
        VLK_ISA::multiply(left, right, rows, depth, columns, out, out_stride, add, [&] { ahead.fetch(); });
    }

    Floats visible(Floats score, Floats hidden, int64_t key, int64_t query) const {
        const Words shown = widen(load_as<Bytes>(mask_.get() + key * pair_.columns + query));
        return shown != 0u ? score : hidden;
    }

    int64_t group() const { return op.heads / op.key_heads; }
    float* lse(int64_t head, Span span) const { return op.lse + head * op.lse_stride + span.start; }

    const Attention& op;
    const int64_t width, stride, longest_step, most_scores;
    Draws draws;
    Ahead ahead;

  private:
    template <typename Element>
    static Element* rows_of(const HeadRows& rows, Span span, int64_t head) {
        return static_cast<Element*>(rows.data) + span.start * rows.row + head * rows.head;
    }

    void copy_rows(const HeadRows& from, Span span, int64_t head, int64_t first, int64_t end, float* to) const {
        const T* data = rows_of<T>(from, span, head);
        for (int64_t row = first; row < end; ++row) {
            for_chunks(op.width, [&](int64_t column, auto chunk, int) {
                const Floats value = load(data + row * from.row + column, chunk);
                store(to + row * stride + column, value, Whole{});
            });
        }
    }

    // Room for the scores of any step: its rows are rounded up to panels, and to an odd number of lines.
    static int64_t scores_of(const Attention& op) {
        const int64_t all = op.longest_key * stride_of(round_up(op.longest_query, panel_queries));
        const int64_t step = step_scores + op.longest_key * 2 * (panel_queries + line_floats);
        return all < step ? all : step;
    }

    void open(int64_t query_sample, Span queries, Span keys, int64_t first, int64_t step) {
        const int64_t rest = queries.length - first;
        pair_ = {query_sample, first, {queries.start + first, rest < step ? rest : step}, keys, 0, 0, false};
        pair_.columns = round_up(pair_.queries.length, lanes);
        pair_.stride = stride_of(pair_.columns);
        pair_.masked = !all_visible_ && fill_mask(op, pair_, op.sources[query_sample], mask_.get());
    }

    bool all_visible_ = true;
    Pair pair_{-1, 0, {}, {}, 0, 0, false};
    Scratch<uint8_t> mask_;
};

}  // namespace vlk::VLK_ISA
