"""Distance and overlap of boxes by hand."""

import pytest
import torch

from engine.objectives.parts.boxes import distance, generalised_overlap, overlap

LEFT_HALF, RIGHT_HALF, WHOLE = [0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]
FIRST_CORNER, LAST_CORNER = [0.1, 0.1, 0.2, 0.2], [0.9, 0.9, 0.2, 0.2]
MIDDLE = [0.5, 0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    "box, other, shared, generalised",
    [
        (LEFT_HALF, LEFT_HALF, 1.0, 1.0),
        (LEFT_HALF, RIGHT_HALF, 0.0, 0.0),  # side by side, the box around them is full
        (LEFT_HALF, WHOLE, 0.5, 0.5),
        (LEFT_HALF, MIDDLE, 1 / 3, 1 / 3),
        (FIRST_CORNER, LAST_CORNER, 0.0, -0.92),  # 0.08 of the picture around them is covered
        (FIRST_CORNER, [0.3, 0.3, 0.2, 0.2], 0.0, -0.5),
    ],
)
def test_overlap(box, other, shared, generalised):
    one, two = torch.tensor([box]), torch.tensor([other])
    for first, second in ((one, two), (two, one)):
        assert overlap(first, second).tolist() == pytest.approx([shared], abs=1e-6)
        assert generalised_overlap(first, second).tolist() == pytest.approx([generalised], abs=1e-6)


def test_distance():
    assert distance(torch.tensor(LEFT_HALF), torch.tensor([FIRST_CORNER, LEFT_HALF])).tolist() == pytest.approx([1.65, 0.0])


def test_boxes_of_no_area_have_finite_gradients():
    boxes = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 2, requires_grad=True)
    generalised_overlap(boxes, torch.tensor([[0.5, 0.5, 0.0, 0.0], LEFT_HALF])).sum().backward()
    assert boxes.grad.isfinite().all()
