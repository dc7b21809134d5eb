import pytest
import torch

import vlkernels as vk


def visible(mask, layout, keys=None):
    """The definition, one pair of rows at a time."""
    keys = keys or layout
    dense = torch.zeros(layout.num_tokens, keys.num_tokens, dtype=torch.bool)
    for b in range(layout.num_samples):
        for r in range(layout.num_segments):
            for c in range(keys.num_segments):
                queries, length = int(layout.lengths[b, r]), int(keys.lengths[b, c])
                for i in range(queries):
                    for j in range(length):
                        cell = ("none", "full", "causal")[mask.codes[r][c]]
                        seen = cell == "full" or (cell == "causal" and j <= i + length - queries)
                        dense[int(layout.starts[b, r]) + i, int(keys.starts[b, c]) + j] = seen
    return dense


@pytest.mark.parametrize(
    "mask",
    [
        vk.SegmentMask.full(2),
        vk.SegmentMask.causal(2),
        vk.SegmentMask.prefix_lm(),
        vk.SegmentMask.block_diagonal([1, 1]),
        vk.SegmentMask([["none", "full"], ["none", "none"]]),
    ],
    ids=repr,
)
def test_dense_follows_the_definition(mask):
    layout = vk.SegmentLayout([[3, 2], [0, 4], [2, 0]], capacity=13)
    assert torch.equal(mask.dense(layout), visible(mask, layout))


def test_rectangular_causal_aligns_the_ends():
    mask = vk.SegmentMask([["causal", "full"]])
    queries, keys = vk.SegmentLayout([[2], [3]]), vk.SegmentLayout([[4, 1], [2, 2]])
    assert torch.equal(mask.dense(queries, keys), visible(mask, queries, keys))


def test_kv_index_redirects_samples():
    queries, keys = vk.SegmentLayout([[1], [1]]), vk.SegmentLayout([[2], [3]])
    dense = vk.SegmentMask.full(1).dense(queries, keys, kv_index=torch.tensor([1, 1]))
    assert dense.int().tolist() == [[0, 0, 1, 1, 1]] * 2


def test_drawing():
    assert str(vk.SegmentMask.prefix_lm()) == "█ ·\n█ ◣"


def test_mistakes_get_one_clear_line():
    layout = vk.SegmentLayout([[1, 1]])
    with pytest.raises(ValueError, match=r"only the diagonal may be causal, got causal at \[0, 1\]"):
        vk.SegmentMask([["full", "causal"], ["full", "full"]]).check(layout, None)
    with pytest.raises(ValueError, match=r"mask must be \[Sq, Sk\] = \[2, 2\], got \[1, 1\]"):
        vk.SegmentMask.full(1).check(layout, None)
    with pytest.raises(ValueError, match="got 'some'"):
        vk.SegmentMask([["some"]])


def test_of_queries_are_rows_of_the_table():
    mask = vk.SegmentMask.prefix_lm()
    assert mask.of_queries((1,)) == vk.SegmentMask([["full", "causal"]])
    assert mask.of_queries([1, 0]).codes == (mask.codes[1], mask.codes[0])
    assert mask.of_queries((1,)) is mask.of_queries([1]), "its tables on devices are made once"
    with pytest.raises(ValueError, match=r"below 2, got \[2\]"):
        mask.of_queries((2,))
