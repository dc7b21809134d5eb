// The six ops of packing, on the CPU. They differ only in which source rows a target row comes from; here that becomes a list of
// addresses for the two loops of packing_cpu.h.
#include "binding/rows.h"
#include "packing/packing_cpu.h"

namespace vlk {
namespace {

// Which rows the segments take: segment s of sample b is rows starts[b, s] : starts[b, s] + lengths[b, s].
struct Segments {
    Segments(const Tensor& starts_, const Tensor& lengths_)
        : starts(read<int32_t>(starts_, ScalarType::Int, "starts")),
          lengths(read<int32_t>(lengths_, ScalarType::Int, "lengths")),
          samples(lengths_.size(0)),
          per_sample(lengths_.size(1)) {
        check_numel(starts_, samples * per_sample, "starts");
    }

    const int32_t *starts, *lengths;
    int64_t samples, per_sample;
};

void check_range(const char* where, int64_t sample, int64_t segment, int64_t start, int64_t length, int64_t end) {
    STD_TORCH_CHECK(start >= 0 && length >= 0 && start + length <= end, "segment ", segment, " of sample ", sample, " has ", length,
                    " rows from row ", start, ", but the ", where, " ends at row ", end);
}

// Where the segments lie in their parts: at `part_starts`, or, without it, at the head of their sample in a padded part.
struct Parts {
    Parts(const Segments& segments_, const std::vector<int64_t>& part_of_, const std::optional<Tensor>& part_starts)
        : segments(segments_), part_of(part_of_), is_padded(!part_starts) {
        STD_TORCH_CHECK(static_cast<int64_t>(part_of.size()) == segments.per_sample, "part_of must have one entry per segment");
        if (part_starts) {
            check_numel(*part_starts, segments.samples * segments.per_sample, "part_starts");
            starts = read<int32_t>(*part_starts, ScalarType::Int, "part_starts");
        }
    }

    int64_t leading() const { return is_padded ? 2 : 1; }

    // visit(part, row in the part, row in the packed tensor, length) for every segment that has a part. `part_rows` are the rows
    // of each part, of one sample where it is padded.
    template <typename Visit>
    void for_each(const std::vector<int64_t>& part_rows, int64_t packed_rows, const Visit& visit) const {
        for (int64_t b = 0; b < segments.samples; ++b) {
            for (int64_t s = 0; s < segments.per_sample; ++s) {
                if (part_of[s] < 0) continue;
                const int64_t i = b * segments.per_sample + s;
                const int64_t rows = part_rows.at(part_of[s]);
                const int64_t start = is_padded ? b * rows : starts[i];
                check_range("part", b, s, start, segments.lengths[i], is_padded ? start + rows : rows);
                check_range("packed tensor", b, s, segments.starts[i], segments.lengths[i], packed_rows);
                visit(part_of[s], start, segments.starts[i], segments.lengths[i]);
            }
        }
    }

    const Segments& segments;
    const std::vector<int64_t>& part_of;
    const bool is_padded;
    const int32_t* starts = nullptr;
};

using Sources = std::vector<const char*>;

void list_range(Sources& sources, int64_t target, const Rows& from, int64_t row, int64_t length) {
    for (int64_t i = 0; i < length; ++i) sources[target + i] = from.at(row + i);
}

// A result larger than this will have left the caches before anyone reads it, so it is written past them.
constexpr int64_t kCached = 8 << 20;

void copy_to(Tensor& out, const Sources& sources, int64_t leading = 1) {
    const Rows rows(out, leading);
    char* target = static_cast<char*>(out.mutable_data_ptr());
    const bool is_aligned = rows.bytes % 16 == 0 && reinterpret_cast<uintptr_t>(target) % 16 == 0;
    const bool through = is_aligned && rows.count * rows.bytes > kCached;
    const auto kernel = VLK_CPU(copy_rows);
    parallel_rows(rows.count, 2 * rows.bytes,
                  [&](int64_t begin, int64_t end) { kernel(sources.data(), rows.bytes, target, begin, end, through); });
}

// Row r of the result is the sum of sources[first[r]] .. sources[first[r + 1] - 1], over divisors[r] if there are any.
Tensor summed(const Tensor& like, const Sources& sources, const std::vector<int64_t>& first, const float* divisors) {
    Tensor out = new_rows(like, {static_cast<int64_t>(first.size()) - 1});
    const Rows rows(out);
    char* target = static_cast<char*>(out.mutable_data_ptr());
    const Dtype dtype = dtype_of(like, "rows to add");
    const auto kernel = VLK_CPU(sum_rows);
    const int64_t average = 1 + static_cast<int64_t>(sources.size()) / std::max<int64_t>(1, rows.count);
    parallel_rows(rows.count, average * rows.bytes, [&](int64_t begin, int64_t end) {
        kernel(dtype, sources.data(), first.data(), divisors, rows.width, target, begin, end);
    });
    return out;
}

Tensor join_segments(const std::vector<Tensor>& tensors, const std::vector<int64_t>& part_of, const std::optional<Tensor>& part_starts,
                     const Tensor& starts, const Tensor& lengths, int64_t num_rows) {
    const Segments segments(starts, lengths);
    const Parts parts(segments, part_of, part_starts);
    std::vector<Rows> from;
    std::vector<int64_t> part_rows;
    for (const Tensor& tensor : tensors) {
        from.emplace_back(tensor, parts.leading());
        STD_TORCH_CHECK(!parts.is_padded || tensor.size(0) == segments.samples, "padded parts must have ", segments.samples, " samples, got ", tensor.size(0));
        part_rows.push_back(tensor.size(parts.leading() - 1));
        STD_TORCH_CHECK(from.back().bytes == from.front().bytes, "all parts must have rows of the same size, got ", from.back().bytes, " and ", from.front().bytes, " bytes");
    }
    Sources sources(num_rows, nullptr);
    parts.for_each(part_rows, num_rows, [&](int64_t part, int64_t row, int64_t packed, int64_t length) {
        list_range(sources, packed, from[part], row, length);
    });
    Tensor out = new_rows(tensors.at(0), {num_rows}, parts.leading());
    copy_to(out, sources);
    return out;
}

std::vector<Tensor> split_segments(const Tensor& x, const std::vector<int64_t>& part_of, const std::optional<Tensor>& part_starts,
                                   const Tensor& starts, const Tensor& lengths, const std::vector<int64_t>& part_rows) {
    const Segments segments(starts, lengths);
    const Parts parts(segments, part_of, part_starts);
    const Rows from(x);
    std::vector<Tensor> tensors;
    std::vector<Sources> sources;
    for (const int64_t rows : part_rows) {
        tensors.push_back(new_rows(x, parts.is_padded ? std::vector<int64_t>{segments.samples, rows} : std::vector<int64_t>{rows}));
        sources.emplace_back(Rows(tensors.back(), parts.leading()).count, nullptr);
    }
    parts.for_each(part_rows, from.count, [&](int64_t part, int64_t row, int64_t packed, int64_t length) {
        list_range(sources[part], row, from, packed, length);
    });
    for (size_t part = 0; part < tensors.size(); ++part) copy_to(tensors[part], sources[part], parts.leading());
    return tensors;
}

// The positions as they stand, int32 or int64, each -1 or a row of a tensor of `rows` rows.
std::vector<int64_t> checked_positions(const Tensor& positions, int64_t rows) {
    check_contiguous(positions, "positions");
    std::vector<int64_t> wide(positions.numel());
    if (positions.scalar_type() == ScalarType::Int) {
        const int32_t* narrow = read<int32_t>(positions, ScalarType::Int, "positions");
        std::copy(narrow, narrow + wide.size(), wide.begin());
    } else {
        const int64_t* same = read<int64_t>(positions, ScalarType::Long, "positions");
        std::copy(same, same + wide.size(), wide.begin());
    }
    for (const int64_t position : wide) {
        STD_TORCH_CHECK(position >= -1 && position < rows, "positions must lie in [-1, ", rows, "), got ", position);
    }
    return wide;
}

Tensor take_rows(const Tensor& x, const Tensor& positions, int64_t num_rows) {
    const Rows from(x);
    const std::vector<int64_t> rows = checked_positions(positions, from.count);
    STD_TORCH_CHECK(static_cast<int64_t>(rows.size()) <= num_rows, "more positions than rows");
    Sources sources(num_rows, nullptr);
    for (size_t i = 0; i < rows.size(); ++i) sources[i] = rows[i] < 0 ? nullptr : from.at(rows[i]);
    Tensor out = new_rows(x, {num_rows});
    copy_to(out, sources);
    return out;
}

// Row r of the result is the sum of the rows of `grad` whose position is r, in their order: a counting sort brings them together.
Tensor take_rows_backward(const Tensor& grad, const Tensor& positions, int64_t num_rows) {
    const Rows from(grad);
    const std::vector<int64_t> rows = checked_positions(positions, num_rows);
    STD_TORCH_CHECK(static_cast<int64_t>(rows.size()) <= from.count, "more positions than rows");
    std::vector<int64_t> first(num_rows + 1, 0);
    for (const int64_t row : rows) {
        if (row >= 0) ++first[row + 1];
    }
    for (int64_t row = 0; row < num_rows; ++row) first[row + 1] += first[row];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    Sources sources(first.back());
    for (size_t i = 0; i < rows.size(); ++i) {
        if (rows[i] >= 0) sources[next[rows[i]]++] = from.at(static_cast<int64_t>(i));
    }
    return summed(grad, sources, first, nullptr);
}

// visit(sample, first row, length) for one segment of every sample.
template <typename Visit>
void for_each_sample(const Segments& segments, int64_t segment, int64_t rows, const Visit& visit) {
    STD_TORCH_CHECK(segment >= 0 && segment < segments.per_sample, "there is no segment ", segment);
    for (int64_t b = 0; b < segments.samples; ++b) {
        const int64_t i = b * segments.per_sample + segment;
        check_range("packed tensor", b, segment, segments.starts[i], segments.lengths[i], rows);
        visit(b, segments.starts[i], segments.lengths[i]);
    }
}

Tensor mean_segment(const Tensor& x, const Tensor& starts, const Tensor& lengths, int64_t segment) {
    const Rows from(x);
    const Segments segments(starts, lengths);
    Sources sources;
    std::vector<int64_t> first{0};
    std::vector<float> divisors;
    for_each_sample(segments, segment, from.count, [&](int64_t, int64_t start, int64_t length) {
        for (int64_t i = 0; i < length; ++i) sources.push_back(from.at(start + i));
        first.push_back(static_cast<int64_t>(sources.size()));
        divisors.push_back(static_cast<float>(length));
    });
    return summed(x, sources, first, divisors.data());
}

// The adjoint of the mean: every row of the segment gets the gradient of its sample over the length, all other rows zero.
Tensor mean_segment_backward(const Tensor& grad, const Tensor& starts, const Tensor& lengths, int64_t segment, int64_t num_rows) {
    const Rows from(grad);
    const Segments segments(starts, lengths);
    check_numel(grad, segments.samples * from.width, "gradient of the means");
    Sources samples;
    std::vector<int64_t> first{0};
    std::vector<float> divisors;
    for_each_sample(segments, segment, num_rows, [&](int64_t b, int64_t, int64_t length) {
        samples.push_back(from.at(b));
        first.push_back(b + 1);
        divisors.push_back(static_cast<float>(std::max<int64_t>(length, 1)));
    });
    const Tensor shares = summed(grad, samples, first, divisors.data());
    const Rows share(shares);
    Sources sources(num_rows, nullptr);
    for_each_sample(segments, segment, num_rows, [&](int64_t b, int64_t start, int64_t length) {
        for (int64_t i = 0; i < length; ++i) sources[start + i] = share.at(b);
    });
    Tensor out = new_rows(grad, {num_rows});
    copy_to(out, sources);
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels, CPU, m) {
    m.impl("join_segments", TORCH_BOX(&join_segments));
    m.impl("split_segments", TORCH_BOX(&split_segments));
    m.impl("take_rows", TORCH_BOX(&take_rows));
    m.impl("take_rows_backward", TORCH_BOX(&take_rows_backward));
    m.impl("mean_segment", TORCH_BOX(&mean_segment));
    m.impl("mean_segment_backward", TORCH_BOX(&mean_segment_backward));
}

}  // namespace
}  // namespace vlk
