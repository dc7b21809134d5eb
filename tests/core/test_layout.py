import pytest
import torch

import vlkernels as vk
from vlkernels.core.layout_checks import _bounds_hold

ROWS = [[2, 3], [0, 1], [4, 0], [0, 0]]


def owners(layout):
    """(sample, segment, position in segment, position in sample) per row, by the definition."""
    table = [(-1, -1, -1, -1)] * layout.num_tokens
    for b in range(layout.num_samples):
        for s in range(layout.num_segments):
            start, length = int(layout.starts[b, s]), int(layout.lengths[b, s])
            for i in range(length):
                table[start + i] = (b, s, i, start + i - int(layout.starts[b, 0]))
    return torch.tensor(table, dtype=torch.int32).reshape(-1, 4)


@pytest.mark.parametrize("capacity", [None, 10, 17])
def test_rows_know_their_owner(capacity):
    layout = vk.SegmentLayout(ROWS, capacity=capacity)
    found = (layout.token_sample(), layout.token_segment(), layout.token_position(), layout.token_position("sample"))
    assert torch.equal(torch.stack(found, 1), owners(layout))
    assert layout.num_tokens == (capacity or 10)
    assert (layout.max_seqlen, layout.max_segment_lengths) == (5, (4, 3))


def test_boundaries():
    layout = vk.SegmentLayout(ROWS)
    assert layout.cu_seqlens.tolist() == [0, 5, 6, 10, 10]
    assert layout.cu_segments.tolist() == [0, 2, 5, 5, 6, 10, 10, 10, 10]
    assert layout.cu_seqlens.dtype == torch.int32


def test_random_layouts_know_their_owners():
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        shape = torch.randint(1, 6, (2,), generator=generator).tolist()
        lengths = torch.randint(0, 4, shape, generator=generator)
        layout = vk.SegmentLayout(lengths, capacity=int(lengths.sum()) + 2)
        assert torch.equal(torch.stack((layout.token_sample(), layout.token_segment()), 1), owners(layout)[:, :2])


def test_take_follows_the_index():
    layout = vk.SegmentLayout(ROWS, sample_ids=[7, 8, 9, 10])
    index = torch.tensor([2, 0, 2])
    taken = layout.take(index)
    assert taken.lengths.tolist() == [[4, 0], [2, 3], [4, 0]]
    assert taken.sample_ids.tolist() == [9, 7, 9]
    assert taken.num_tokens == 15
    expected = [6, 7, 8, 9, 0, 1, 2, 3, 4, 6, 7, 8, 9, -1, -1]
    assert layout.take_positions(index).tolist() == expected


def test_select_keeps_some_segments():
    layout = vk.SegmentLayout(ROWS, sample_ids=[7, 8, 9, 10])
    text = layout.select([1])
    assert text.lengths.flatten().tolist() == [3, 1, 0, 0] and text.num_tokens == 4
    assert text.sample_ids.tolist() == [7, 8, 9, 10]
    assert layout.select([1, 0]).starts.tolist() == [[0, 3], [5, 6], [6, 6], [10, 10]]


def test_padded_layout_has_gaps():
    layout = vk.SegmentLayout.padded([2, 0, 3], 4)
    assert layout.token_sample().tolist() == [0, 0, -1, -1, -1, -1, -1, -1, 2, 2, 2, -1]
    assert layout.cu_seqlens.tolist() == [0, 4, 8, 12]
    with pytest.raises(ValueError, match="gaps"):
        layout.cu_segments


def test_from_cu_seqlens():
    layout = vk.SegmentLayout.from_cu_seqlens(torch.tensor([0, 3, 3, 7]), max_seqlen=4)
    assert layout.lengths.flatten().tolist() == [3, 0, 4] and layout.num_tokens == 7
    assert torch.equal(layout.cu_seqlens, torch.tensor([0, 3, 3, 7], dtype=torch.int32))


def from_bounds(bounds, num_tokens=None):
    return vk.SegmentLayout.from_cu_seqlens(torch.tensor(bounds), max_seqlen=5, num_tokens=num_tokens)


def test_lengths_may_come_transposed():
    layout = vk.SegmentLayout(torch.tensor([[3, 1], [2, 4]]).T)
    assert layout.lengths.tolist() == [[3, 2], [1, 4]] and layout.lengths.is_contiguous()
    renamed = layout.with_sample_ids(torch.arange(4, dtype=torch.int32)[::2])
    assert renamed.sample_ids.tolist() == [0, 2] and renamed.sample_ids.is_contiguous()


def test_what_inference_mode_fills_serves_training():
    layout = vk.SegmentLayout(ROWS)
    with torch.inference_mode():
        mask = vk.SegmentMask.prefix_lm()
        made = [layout.token_keys(), layout.token_sample(), layout.cu_segments, layout.select((1,)).starts]
    kept = [layout.token_keys(), layout._flat_segment(), layout.cu_segments, layout.select((1,)).starts, mask.table("cpu")]
    assert len(made) == 4 and not any(tensor.is_inference() for tensor in kept)


def test_keys_are_sample_id_and_position():
    layout = vk.SegmentLayout([[1, 2]], capacity=4, sample_ids=[41])
    assert layout.token_keys().tolist()[:3] == [[41, 0], [41, 1], [41, 2]]


def test_empty_batch():
    layout = vk.SegmentLayout(torch.zeros(0, 2, dtype=torch.int64))
    assert layout.num_tokens == 0 and layout.token_sample().shape == (0,) and layout.token_keys().shape == (0, 2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: vk.SegmentLayout([[1], [1, 2]]), r"same number of segments, got \[1, 2\]"),
        (lambda: vk.SegmentLayout([[3, -1]]), "must not be negative, got -1"),
        (lambda: vk.SegmentLayout([[3, 4]], capacity=6), "capacity must be at least the sum of the lengths = 7, got 6"),
        (lambda: vk.SegmentLayout([[1] * 17]), r"1 <= S <= 16, got \[1, 17\]"),
        (lambda: vk.SegmentLayout([[1]], sample_ids=[1, 2]), r"sample_ids must be \[B\] = \[1\], got \[2\]"),
        (lambda: vk.SegmentLayout([[1]]).select([1]), r"segments must be indices below 1, got \[1\]"),
        (lambda: vk.SegmentLayout([[1]]).token_position("batch"), "'batch'"),
        (lambda: vk.SegmentLayout.padded([5], 4), "at most max_len = 4, got 5"),
        (lambda: vk.SegmentLayout.padded([1, 1, 1], 2**30), r"2\*\*31 - 1 tokens, got 3221225472"),
        (lambda: vk.SegmentLayout([[1]], capacity=2**31), r"2\*\*31 - 1 tokens, got 2147483648"),
        (lambda: vk.SegmentLayout(torch.tensor([[2.7]])), "lengths must be integers, got torch.float32"),
        (lambda: vk.SegmentLayout([[2.7]]), "lengths must be integers, got 2.7"),
        (lambda: vk.SegmentLayout(torch.ones(2, 8).bool()), "lengths must be integers, got torch.bool"),
        (lambda: vk.SegmentLayout([3, 4]), r"lengths must be \[B, S\]: a sample of one segment is \[3\], got 3"),
        (lambda: vk.SegmentLayout([[1], [2]]).take(torch.tensor([0, -1])), r"index must lie in \[0, 2\), got values from -1"),
        (lambda: vk.SegmentLayout([[2**30]]).take(torch.zeros(3, dtype=torch.int32)), r"2\*\*31 - 1 tokens, got 3221225472"),
        (lambda: from_bounds([0.0, 3.0]), "cu_seqlens must be one of int64, int32, got float32"),
        (lambda: from_bounds([0, 5, 3]), r"rise from 0 to at most num_tokens = 3, got \[0, 5, 3\]"),
        (lambda: from_bounds([2, 5]), r"rise from 0 to at most num_tokens = 5, got \[2, 5\]"),
        (lambda: from_bounds([0, 5, 8], num_tokens=6), r"rise from 0 to at most num_tokens = 6, got \[0, 5, 8\]"),
        (lambda: from_bounds([0, 5, 12]), "max_seqlen must be at least the longest sample = 7, got 5"),
    ],
)
def test_mistakes_get_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bounds", ([0, 5, 3], [2, 5], [0, 5, 8], [0, 6], [0, 3, 7], [0]))
def test_bounds_on_a_device_are_checked_there(bounds, monkeypatch):
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", asserted.append)
    vk.SegmentLayout.from_cu_seqlens(torch.tensor(bounds, device="meta"), max_seqlen=5, num_tokens=7)
    assert len(asserted) == 1 and asserted[0].is_meta and asserted[0].shape == ()
    try:
        from_bounds(bounds, num_tokens=7)
        accepted = True
    except ValueError:
        accepted = False
    assert bool(_bounds_hold(torch.tensor(bounds), 5, 7)) == accepted == (bounds in ([0, 3, 7], [0]))


def test_slots_leave_room_behind_every_sample():
    layout = vk.SegmentLayout.slots(torch.tensor([[2, 3], [0, 1], [0, 0]]), rows=6, max_seqlen=5)
    assert layout.starts.tolist() == [[0, 2], [6, 6], [12, 12]]
    assert torch.equal(torch.stack((layout.token_sample(), layout.token_segment()), 1), owners(layout)[:, :2])
    assert layout.num_tokens == 18 and layout.cu_seqlens.tolist() == [0, 6, 12, 18] and layout.has_gaps
    with pytest.raises(ValueError, match="max_seqlen must be at most rows = 4, got 5"):
        vk.SegmentLayout.slots(torch.tensor([[2, 3]]), rows=4, max_seqlen=5)
    with pytest.raises(ValueError, match=r"lengths must be \[B, S\]"):
        vk.SegmentLayout.slots(torch.tensor([2, 3]), rows=4, max_seqlen=3)


def test_joined_segments_lie_one_behind_the_other():
    layout = vk.SegmentLayout(ROWS, capacity=12, sample_ids=[7, 5, 3, 1])
    other = vk.SegmentLayout([[1], [0], [6], [2]])
    joined = vk.SegmentLayout.joined((2, layout, other))
    plain = vk.SegmentLayout([[2, *a, *b] for a, b in zip(ROWS, [[1], [0], [6], [2]], strict=True)])
    assert torch.equal(joined.starts, plain.starts) and torch.equal(joined.lengths, plain.lengths)
    assert torch.equal(joined.token_segment()[: plain.num_tokens], plain.token_segment())
    assert joined.sample_ids.tolist() == [7, 5, 3, 1]
    assert joined.max_segment_lengths == plain.max_segment_lengths and joined.segment_totals == plain.segment_totals
    assert joined.num_tokens == plain.num_tokens + 2 and joined.max_seqlen >= plain.max_seqlen
    assert not joined.exact and vk.SegmentLayout.joined((2, other)).exact
    assert vk.SegmentLayout.joined((2, layout.to("meta"))).device.type == "meta"


@pytest.mark.parametrize(
    "parts, message",
    [
        ((2,), r"there must be a layout among what is joined, got \[2\]"),
        ((-1, vk.SegmentLayout([[1]])), r"lengths must not be negative, got \[-1\]"),
        ((vk.SegmentLayout([[1]]), vk.SegmentLayout([[1], [2]])), r"the same samples, got \[1, 2\] of them"),
        ((vk.SegmentLayout([[1] * 16]), 1), "at most 16 segments, got 17"),
    ],
)
def test_what_cannot_be_joined(parts, message):
    with pytest.raises(ValueError, match=message):
        vk.SegmentLayout.joined(parts)
