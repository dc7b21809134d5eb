// The six ops of packing on a CUDA device, where the kernels read the layout: nothing here looks at a value.
#ifdef VLK_WITH_CUDA
#include "packing/packing_cuda.h"

#include <array>

#include "binding/cuda.h"
#include "binding/rows.h"

namespace vlk {
namespace {

Segments segments_of(const Tensor& starts, const Tensor& lengths) {
    const int64_t samples = lengths.size(0), per_sample = lengths.size(1);
    check_numel(starts, samples * per_sample, "starts");
    STD_TORCH_CHECK(per_sample >= 1 && per_sample <= most_segments, "a sample must have 1 to ", most_segments, " segments, got ", per_sample);
    STD_TORCH_CHECK(samples * per_sample <= INT32_MAX, "a layout must have less than 2**31 segments");
    return {read<int32_t>(starts, ScalarType::Int, "starts"), read<int32_t>(lengths, ScalarType::Int, "lengths"),
            static_cast<int32_t>(samples), static_cast<int32_t>(per_sample)};
}

Segments segments_of(const Tensor& starts, const Tensor& lengths, int64_t segment) {
    const Segments segments = segments_of(starts, lengths);
    STD_TORCH_CHECK(segment >= 0 && segment < segments.per_sample, "there is no segment ", segment);
    return segments;
}

// `packed` and `tensors` hold the same rows in another order.
template <typename Op>
Op moved_segments(const Tensor& packed, const std::vector<Tensor>& tensors, const std::vector<int64_t>& part_of,
                  const std::optional<Tensor>& part_starts, const Tensor& starts, const Tensor& lengths) {
    check_same_device(packed, {part_starts, starts, lengths});
    Op op{};
    op.segments = segments_of(starts, lengths);
    const Rows rows(packed);
    op.packed = const_cast<char*>(rows.data);
    op.packed_rows = rows.count;
    op.row_bytes = rows.bytes;
    Parts& parts = op.parts;
    STD_TORCH_CHECK(static_cast<int64_t>(part_of.size()) == op.segments.per_sample, "part_of must have one entry per segment");
    STD_TORCH_CHECK(tensors.size() <= part_of.size(), "there must be at most as many parts as segments");
    if (part_starts) {
        check_numel(*part_starts, starts.numel(), "part_starts");
        parts.starts = read<int32_t>(*part_starts, ScalarType::Int, "part_starts");
    }
    const int64_t leading = part_starts ? 1 : 2;
    for (const Tensor& tensor : tensors) {
        check_same_device(packed, {tensor});
        const Rows part(tensor, leading);
        STD_TORCH_CHECK(part_starts || tensor.size(0) == op.segments.samples, "padded parts must have ", op.segments.samples, " samples, got ", tensor.size(0));
        STD_TORCH_CHECK(part.bytes == rows.bytes, "all parts must have rows of the same size, got ", part.bytes, " and ", rows.bytes, " bytes");
        parts.data[parts.count] = const_cast<char*>(part.data);
        parts.rows[parts.count++] = tensor.size(leading - 1);
    }
    std::array<int, most_segments> segments_in{};
    for (size_t segment = 0; segment < part_of.size(); ++segment) {
        const int64_t part = part_of[segment];
        STD_TORCH_CHECK(part < parts.count, "there is no part ", part);
        parts.part_of[segment] = part < 0 ? -1 : static_cast<int32_t>(part);
        if (part >= 0) ++segments_in[part];
    }
    for (int part = 0; part < parts.count; ++part)
        STD_TORCH_CHECK(part_starts ? segments_in[part] > 0 : segments_in[part] == 1, "part ", part, " holds ", segments_in[part], " segments");
    return op;
}

Tensor join_segments(const std::vector<Tensor>& tensors, const std::vector<int64_t>& part_of, const std::optional<Tensor>& part_starts,
                     const Tensor& starts, const Tensor& lengths, int64_t num_rows) {
    Tensor out = new_rows(tensors.at(0), {num_rows}, part_starts ? 1 : 2);
    const auto op = moved_segments<JoinSegments>(out, tensors, part_of, part_starts, starts, lengths);
    const OnDeviceOf device(out);
    check_launch(join_segments_cuda(op, device.stream()), "join_segments");
    return out;
}

std::vector<Tensor> split_segments(const Tensor& x, const std::vector<int64_t>& part_of, const std::optional<Tensor>& part_starts,
                                   const Tensor& starts, const Tensor& lengths, const std::vector<int64_t>& part_rows) {
    std::vector<Tensor> tensors;
    for (const int64_t rows : part_rows)
        tensors.push_back(new_rows(x, part_starts ? std::vector<int64_t>{rows} : std::vector<int64_t>{lengths.size(0), rows}));
    const auto op = moved_segments<SplitSegments>(x, tensors, part_of, part_starts, starts, lengths);
    const OnDeviceOf device(x);
    check_launch(split_segments_cuda(op, device.stream()), "split_segments");
    return tensors;
}

Positions positions_of(const Tensor& positions) {
    check_contiguous(positions, "positions");
    const bool is_wide = positions.scalar_type() == ScalarType::Long;
    if (!is_wide) check_type(positions, ScalarType::Int, "positions");
    return {positions.const_data_ptr(), is_wide, positions.numel()};
}

Tensor take_rows(const Tensor& x, const Tensor& positions, int64_t num_rows) {
    check_same_device(x, {positions});
    STD_TORCH_CHECK(positions.numel() <= num_rows, "more positions than rows");
    const Rows from(x);
    Tensor out = new_rows(x, {num_rows});
    const TakeRows op{positions_of(positions), from.data, from.count, static_cast<char*>(out.mutable_data_ptr()), num_rows, from.bytes};
    const OnDeviceOf device(x);
    check_launch(take_rows_cuda(op, device.stream()), "take_rows");
    return out;
}

// The positions in rising order, and where each of them stood; equals stay in their order.
std::pair<Tensor, Tensor> sorted(const Tensor& positions) {
    using torch::stable::detail::from;
    std::array<StableIValue, 4> stack{from(positions), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
    return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Tensor take_rows_backward(const Tensor& grad, const Tensor& positions, int64_t num_rows) {
    check_same_device(grad, {positions});
    const Rows from(grad);
    STD_TORCH_CHECK(positions.numel() <= from.count, "more positions than rows");
    const OnDeviceOf device(grad);
    const auto [values, order] = sorted(positions);
    Tensor out = new_rows(grad, {num_rows});
    const TakeRowsBackward op{dtype_of(grad, "rows to add"), from.width, positions_of(values),
                              read<int64_t>(order, ScalarType::Long, "order"), from.data, out.mutable_data_ptr(), num_rows};
    check_launch(take_rows_backward_cuda(op, device.stream()), "take_rows_backward");
    return out;
}

Tensor mean_segment(const Tensor& x, const Tensor& starts, const Tensor& lengths, int64_t segment) {
    check_same_device(x, {starts, lengths});
    const Rows from(x);
    Tensor out = new_rows(x, {lengths.size(0)});
    const MeanSegment op{dtype_of(x, "rows to add"), from.width, segments_of(starts, lengths, segment), static_cast<int32_t>(segment),
                         from.data, from.count, out.mutable_data_ptr()};
    const OnDeviceOf device(x);
    check_launch(mean_segment_cuda(op, device.stream()), "mean_segment");
    return out;
}

Tensor mean_segment_backward(const Tensor& grad, const Tensor& starts, const Tensor& lengths, int64_t segment, int64_t num_rows) {
    check_same_device(grad, {starts, lengths});
    const Rows from(grad);
    STD_TORCH_CHECK(from.count == lengths.size(0), "the means must be one per sample = ", lengths.size(0), ", got ", from.count);
    Tensor out = new_rows(grad, {num_rows});
    const MeanSegmentBackward op{dtype_of(grad, "rows to add"), from.width, segments_of(starts, lengths, segment),
                                 static_cast<int32_t>(segment), from.data, out.mutable_data_ptr(), num_rows};
    const OnDeviceOf device(grad);
    check_launch(mean_segment_backward_cuda(op, device.stream()), "mean_segment_backward");
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels, CUDA, m) {
    m.impl("join_segments", TORCH_BOX(&join_segments));
    m.impl("split_segments", TORCH_BOX(&split_segments));
    m.impl("take_rows", TORCH_BOX(&take_rows));
    m.impl("take_rows_backward", TORCH_BOX(&take_rows_backward));
    m.impl("mean_segment", TORCH_BOX(&mean_segment));
    m.impl("mean_segment_backward", TORCH_BOX(&mean_segment_backward));
}

}  // namespace
}  // namespace vlk
#endif
