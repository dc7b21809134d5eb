#include "attention/attention_cpu.h"

#include "binding/binding.h"

#include <numeric>

namespace vlk {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check_heads(const Tensor& x, int64_t dims, const char* name) {
    STD_TORCH_CHECK(x.dim() == dims, name, " must have ", dims, " dimensions, got ", x.dim());
    STD_TORCH_CHECK(x.stride(dims - 1) == 1 || x.size(dims - 1) <= 1, "the last dimension of ", name,
                    " must be contiguous");
}

// Rows and heads are the first and the last but one dimension; `member` is 0..2 of a packed [T, 3, H, K].
HeadRows head_rows(const Tensor& x, int64_t member = 0) {
    const int64_t dims = x.dim();
    HeadRows rows{const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(dims - 2)};
    const int64_t offset = dims == 4 ? member * x.stride(1) * static_cast<int64_t>(x.element_size()) : 0;
    rows.data = static_cast<char*>(rows.data) + offset;
    return rows;
}

int64_t length_of(const Samples& samples, int64_t sample) {
    int64_t length = 0;
    for (int64_t s = 0; s < samples.segments; ++s) length += samples.lengths[sample * samples.segments + s];
    return length;
}

int64_t longest_of(const Samples& samples) {
    int64_t longest = 0;
    for (int64_t b = 0; b < samples.count; ++b) longest = std::max(longest, length_of(samples, b));
    return longest;
}

Samples samples_of(const Tensor& starts, const Tensor& lengths, int64_t rows) {
    STD_TORCH_CHECK(lengths.dim() == 2, "lengths must be [B, S]");
    check_numel(starts, lengths.numel(), "starts");
    const Samples samples{read<int32_t>(starts, ScalarType::Int, "starts"),
                          read<int32_t>(lengths, ScalarType::Int, "lengths"), lengths.size(0),
                          lengths.size(1)};
    for (int64_t i = 0; i < lengths.numel(); ++i)
        STD_TORCH_CHECK(samples.lengths[i] >= 0, "a segment has ", samples.lengths[i], " rows");
    for (int64_t b = 0; b < samples.count; ++b) {
        const int64_t start = samples.starts[b * samples.segments], length = length_of(samples, b);
        STD_TORCH_CHECK(start >= 0 && start + length <= rows, "sample ", b, " has ", length,
                        " rows from row ", start, " of ", rows);
    }
    return samples;
}

bool covers(const Samples& samples, int64_t rows) {
    int64_t total = 0;
    for (int64_t b = 0; b < samples.count; ++b) total += length_of(samples, b);
    return total == rows;
}

std::vector<int64_t> sources_of(const OptionalTensor& kv_index, const Samples& queries, const Samples& keys) {
    std::vector<int64_t> sources(queries.count);
    if (kv_index) {
        check_numel(*kv_index, queries.count, "kv_index");
        check_contiguous(*kv_index, "kv_index");
    } else {
        STD_TORCH_CHECK(queries.count == keys.count, "as many key samples as query samples, or a kv_index");
    }
    const void* index = kv_index ? kv_index->const_data_ptr() : nullptr;
    const bool narrow = kv_index && kv_index->scalar_type() == ScalarType::Int;
    if (kv_index && !narrow) check_type(*kv_index, ScalarType::Long, "kv_index");
    for (int64_t b = 0; b < queries.count; ++b) {
        sources[b] = !index   ? b
                     : narrow ? static_cast<const int32_t*>(index)[b]
                              : static_cast<const int64_t*>(index)[b];
        STD_TORCH_CHECK(sources[b] >= 0 && sources[b] < keys.count, "kv_index must lie in [0, ", keys.count,
                        "), got ", sources[b]);
    }
    return sources;
}

struct Arguments {
    const std::vector<Tensor>& qkv;
    const Tensor &starts, &lengths;
    const OptionalTensor &kv_starts, &kv_lengths, &kv_index;
    const Tensor &table, &sample_ids;
    const OptionalTensor& rng_state;
    double scale;
    int64_t threshold, stream;
};

void set_heads(Attention& op, const std::vector<Tensor>& qkv) {
    STD_TORCH_CHECK(qkv.size() == 1 || qkv.size() == 3, "qkv must be one tensor or three");
    const bool packed = qkv.size() == 1;
    for (const Tensor& x : qkv) {
        check_heads(x, packed ? 4 : 3, "qkv");
        check_type(x, qkv[0].scalar_type(), "qkv");
    }
    const Tensor &q = qkv[0], &k = qkv[packed ? 0 : 1], &v = qkv[packed ? 0 : 2];
    const int64_t last = q.dim() - 1;
    op.dtype = dtype_of(q, "q");
    op.width = q.size(last);
    op.heads = q.size(last - 1);
    op.key_heads = k.size(last - 1);
    STD_TORCH_CHECK(!packed || q.size(1) == 3, "a packed qkv must be [T, 3, H, K]");
    STD_TORCH_CHECK(op.key_heads > 0 && op.heads % op.key_heads == 0, "H must be a multiple of Hkv");
    STD_TORCH_CHECK(k.size(last) == op.width && v.size(last) == op.width && v.size(0) == k.size(0) &&
                        v.size(last - 1) == op.key_heads,
                    "k and v must be [Tk, Hkv, K]");
    op.q = head_rows(q, 0);
    op.k = head_rows(k, 1);
    op.v = head_rows(v, 2);
}

// Everything both directions read; `sources` outlives the call.
void set_inputs(Attention& op, const Arguments& from, std::vector<int64_t>& sources) {
    set_heads(op, from.qkv);
    op.queries = samples_of(from.starts, from.lengths, from.qkv[0].size(0));
    op.keys = op.queries;
    if (from.kv_starts) {
        STD_TORCH_CHECK(from.kv_lengths && from.qkv.size() == 3, "kv_lengths must come with kv_starts");
        op.keys = samples_of(*from.kv_starts, *from.kv_lengths, from.qkv[1].size(0));
    } else {
        STD_TORCH_CHECK(from.qkv.back().size(0) == from.qkv[0].size(0), "k must have the rows of q");
    }
    sources = sources_of(from.kv_index, op.queries, op.keys);
    op.sources = sources.data();
    check_numel(from.table, op.queries.segments * op.keys.segments, "table");
    check_numel(from.sample_ids, op.queries.count, "sample_ids");
    op.table = read<int32_t>(from.table, ScalarType::Int, "table");
    op.sample_ids = read<int32_t>(from.sample_ids, ScalarType::Int, "sample_ids");
    op.scale = static_cast<float>(from.scale);
    op.longest_query = longest_of(op.queries);
    op.longest_key = longest_of(op.keys);
    if (from.threshold == 0) return;
    STD_TORCH_CHECK(from.rng_state && from.threshold < 256,
                    "dropout needs a random state and a threshold below 256");
    check_numel(*from.rng_state, 2, "rng_state");
    op.dropout.state = read<int64_t>(*from.rng_state, ScalarType::Long, "rng_state");
    op.dropout.stream = from.stream;
    op.dropout.threshold = static_cast<int32_t>(from.threshold);
}

// Where shares of the items end. A thread takes all heads of a sample while much is left, as their rows lie
// side by side, and fewer towards the end, so that all threads end together.
std::vector<int64_t> bounds_of_shares(int64_t items, int64_t heads, int64_t fewest, int64_t threads) {
    std::vector<int64_t> bounds{0};
    while (bounds.back() < items) {
        const int64_t rest = items - bounds.back();
        const int64_t taken = std::max(fewest, std::min(heads, rest / (4 * threads)));
        bounds.push_back(bounds.back() + std::min(rest, taken));
    }
    return bounds;
}

// Calls work(items) on torch's threads, longest samples first, so that the last items are short. A thread is
// worth waking for a million products.
template <typename Work>
void parallel_items(const Attention& op, const Samples& samples, const Work& work) {
    std::vector<int64_t> order(samples.count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return length_of(samples, a) > length_of(samples, b); });
    const int64_t products = op.longest_query * op.longest_key * op.width * (op.heads / op.key_heads);
    const int64_t fewest = std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(1, 4 * products));
    const int64_t count = samples.count * op.key_heads;
    const int64_t threads =
        std::min<int64_t>((count + fewest - 1) / fewest, torch::stable::get_num_threads());
    const std::vector<int64_t> bounds =
        bounds_of_shares(count, op.key_heads, fewest, std::max<int64_t>(threads, 1));
    std::atomic<int64_t> next{0};
    const Items items{order.data(), bounds.data(), static_cast<int64_t>(bounds.size()) - 1, &next};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(items); });
}

// A new tensor; zeros where not every row will be written.
Tensor new_rows(const Tensor& like, bool written) {
    const auto sizes = like.sizes();
    const std::vector<int64_t> shape(sizes.begin(), sizes.end());
    return written ? torch::stable::new_empty(like, shape) : torch::stable::new_zeros(like, shape);
}

std::tuple<Tensor, Tensor> forward(const std::vector<Tensor>& qkv, const Tensor& starts,
                                   const Tensor& lengths, const OptionalTensor& kv_starts,
                                   const OptionalTensor& kv_lengths, const OptionalTensor& kv_index,
                                   const Tensor& table, const Tensor& sample_ids,
                                   const OptionalTensor& rng_state, double scale, int64_t threshold,
                                   int64_t stream) {
    AttentionForward op{};
    std::vector<int64_t> sources;
    set_inputs(op,
               {qkv, starts, lengths, kv_starts, kv_lengths, kv_index, table, sample_ids, rng_state, scale,
                threshold, stream},
               sources);
    const int64_t rows = qkv[0].size(0);
    const bool written = covers(op.queries, rows);
    const std::vector<int64_t> shape{rows, op.heads, op.width};
    Tensor out = written ? torch::stable::new_empty(qkv[0], shape) : torch::stable::new_zeros(qkv[0], shape);
    Tensor lse = new_float(qkv[0], {op.heads, rows});
    if (!written) torch::stable::fill_(lse, -__builtin_inf());
    op.out = head_rows(out);
    op.lse = static_cast<float*>(lse.mutable_data_ptr());
    op.lse_stride = rows;
    const auto kernel = VLK_CPU(attention_forward);
    parallel_items(op, op.queries, [&](const Items& items) { kernel(op, items); });
    return {out, lse};
}

// The query samples of every key sample, in their order.
struct Readers {
    Readers(const std::vector<int64_t>& sources, int64_t key_samples)
        : first(key_samples + 1, 0), samples(sources.size()) {
        for (const int64_t source : sources) ++first[source + 1];
        for (int64_t s = 0; s < key_samples; ++s) first[s + 1] += first[s];
        std::vector<int64_t> next(first.begin(), first.end() - 1);
        for (size_t b = 0; b < sources.size(); ++b) samples[next[sources[b]]++] = static_cast<int64_t>(b);
    }
    std::vector<int64_t> first, samples;
};

const float* statistics(const Tensor& tensor, int64_t count, const char* name) {
    check_numel(tensor, count, name);
    return read<float>(tensor, ScalarType::Float, name);
}

std::vector<Tensor> backward(const Tensor& grad_out, const OptionalTensor& grad_lse,
                             const std::vector<Tensor>& qkv, const Tensor& starts, const Tensor& lengths,
                             const OptionalTensor& kv_starts, const OptionalTensor& kv_lengths,
                             const OptionalTensor& kv_index, const Tensor& table, const Tensor& sample_ids,
                             const OptionalTensor& rng_state, const Tensor& lse, double scale,
                             int64_t threshold, int64_t stream) {
    AttentionBackward op{};
    std::vector<int64_t> sources;
    set_inputs(op,
               {qkv, starts, lengths, kv_starts, kv_lengths, kv_index, table, sample_ids, rng_state, scale,
                threshold, stream},
               sources);
    const int64_t rows = qkv[0].size(0);
    check_heads(grad_out, 3, "grad_out");
    check_type(grad_out, qkv[0].scalar_type(), "grad_out");
    STD_TORCH_CHECK(grad_out.size(0) == rows && grad_out.size(1) == op.heads && grad_out.size(2) == op.width,
                    "grad_out must be [", rows, ", ", op.heads, ", ", op.width, "]");
    op.grad_out = head_rows(grad_out);
    op.lse = const_cast<float*>(statistics(lse, op.heads * rows, "lse"));
    op.lse_stride = rows;
    op.grad_lse = grad_lse ? statistics(*grad_lse, op.heads * rows, "grad_lse") : nullptr;
    const Readers readers(sources, op.keys.count);
    op.first = readers.first.data();
    op.readers = readers.samples.data();

    std::vector<Tensor> grads;
    for (const Tensor& x : qkv) {
        const bool of_queries = grads.empty();
        const bool written = covers(of_queries ? op.queries : op.keys, x.size(0));
        grads.push_back(new_rows(x, written));
    }
    op.dq = head_rows(grads.front(), 0);
    op.dk = head_rows(grads[grads.size() / 2], 1);
    op.dv = head_rows(grads.back(), 2);
    const auto kernel = VLK_CPU(attention_backward);
    parallel_items(op, op.keys, [&](const Items& items) { kernel(op, items); });
    return grads;
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels, CPU, m) {
    m.impl("attention_cpp_forward", TORCH_BOX(&forward));
    m.impl("attention_cpp_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace vlk
