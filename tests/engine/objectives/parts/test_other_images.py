"""Texts laid out as other pages."""

import torch
import vlkernels as vk

from engine.batch import Text
from engine.objectives.parts.other_images import boxes_of_others


def test_words_stand_where_those_of_the_other_page_do():
    """Ends keep to ends; words begin again behind the other page's last; a page may be empty."""
    lengths = (3, 6, 2)
    layout = vk.SegmentLayout([[length] for length in lengths])
    boxes = torch.tensor([[10 * page + place] * 4 for page, length in enumerate(lengths) for place in range(length)])
    found = boxes_of_others(Text(torch.zeros(11, dtype=torch.int64), layout, boxes=boxes), torch.tensor([1, 0, 1]))
    assert found[:, 0].tolist() == [10, 11, 15, 0, 1, 1, 1, 1, 2, 10, 15]
    onto_empty = boxes_of_others(Text(torch.zeros(11, dtype=torch.int64), layout, boxes=boxes), torch.tensor([2, 2, 0]))
    assert onto_empty[:, 0].tolist() == [20, 21, 21, 20, 21, 21, 21, 21, 21, 0, 2]
