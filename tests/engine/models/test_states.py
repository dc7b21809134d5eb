"""Momentum copies, queues, codebooks and batch norm, one module at a time."""

import pytest
import torch
import vlkernels as vk
from torch import nn

from engine.models.batch_norm import BatchNorm, FrozenBatchNorm
from engine.models.codebook import Codebook
from engine.models.momentum import FeatureQueue, MomentumCopy
from engine.models.states import FollowsSteps
from engine.training.averages import Averages


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.map, self.drop, self.rng = nn.Linear(3, 3), nn.Dropout(), vk.Rng(0)

    def forward(self, x):
        return self.drop(self.map(x))


def test_a_copy_follows_and_has_no_gradient():
    source = Part()
    copied = MomentumCopy(source, 0.75)
    with torch.no_grad():
        copied.module.map.weight.fill_(1.0)
        source.map.weight.fill_(2.0)
    averages = Averages(copied, lambda parameter: [parameter.data])
    averages.follow()
    assert torch.equal(copied.module.map.weight, torch.full((3, 3), 1.25))
    averages.follow()
    assert torch.equal(copied.module.map.weight, torch.full((3, 3), 1.4375))
    assert not copied(torch.ones(1, 3)).requires_grad and not any(p.requires_grad for p in copied.parameters())
    assert [name for name, _ in copied.named_parameters()] == ["module.map.weight", "module.map.bias"]


def test_a_copy_stays_in_evaluation_mode_and_shares_the_state_of_the_draws():
    source = Part()
    copied = MomentumCopy(source, 0.9).train()
    assert copied.module.drop.training is False and copied.module.rng is source.rng
    with torch.no_grad():
        source.map.bias.fill_(7.0)
    copied.begin()
    assert torch.equal(copied.module.map.bias, source.map.bias)


def test_a_frozen_teacher_stands_still():
    source = Part()
    copied = MomentumCopy(source, 1.0)
    start = copied.module.map.weight.clone()
    with torch.no_grad():
        source.map.weight.zero_()
    Averages(copied, lambda parameter: [parameter.data]).follow()
    assert torch.equal(copied.module.map.weight, start)
    with pytest.raises(ValueError, match=r"momentum of a copy must be in \[0, 1\], got 1.5"):
        MomentumCopy(source, 1.5)


def test_the_queue_replaces_the_oldest_and_wraps():
    queue = FeatureQueue(6, 2)
    start = queue.features.clone()
    assert torch.allclose(start.norm(dim=1), torch.ones(6))
    for step in range(4):
        queue.push(torch.full((1, 2), float(step)))
        queue.push(torch.full((1, 2), step + 0.5))
        queue.after_step(applied=step != 1)
        if step == 0:
            assert torch.equal(queue.features[2:], start[2:])
    assert queue.features[:, 0].tolist() == [0.0, 0.5, 2.0, 2.5, 3.0, 3.5]
    queue.push(torch.full((2, 2), 9.0))
    queue.after_step(applied=True)
    assert queue.features[:, 0].tolist() == [9.0, 9.0, 2.0, 2.5, 3.0, 3.5]
    queue.eval().push(torch.zeros(2, 2))
    queue.after_step(applied=True)
    assert queue.features[2, 0] == 2.0


def test_a_global_batch_that_does_not_divide_the_queue_is_one_line():
    queue = FeatureQueue(6, 2)
    queue.push(torch.ones(4, 2))
    with pytest.raises(ValueError, match="a whole number of global batches: 6 features, 4 pairs per step"):
        queue.after_step(applied=True)


def test_the_codebook_by_hand():
    book = Codebook(3, 1)
    book.codes.copy_(torch.tensor([[0.0], [10.0], [20.0]]))
    rows = torch.tensor([[1.0], [2.0], [9.0]], requires_grad=True)
    codes, index = book(rows)
    assert index.tolist() == [0, 0, 1] and codes.flatten().tolist() == [0.0, 0.0, 10.0]
    (codes * torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
    assert rows.grad.flatten().tolist() == [1.0, 2.0, 3.0]
    with torch.no_grad():
        book(rows * 100)  # a reading without a graph counts nothing
    book.after_step(applied=True)
    # decay 0.4 of nothing: counts 1.2, 0.6, 0; sums 1.8, 5.4, 0; smoothing gives a code nobody chose 0 / something
    assert book.codes.flatten().tolist() == pytest.approx([1.5, 9.0, 0.0], rel=1e-4)
    book(rows)
    book.after_step(applied=False)
    assert book.steps.item() == 1
    for _ in range(3):
        book(torch.tensor([[3.0]]))
        book.after_step(applied=True)
    assert book.codes[0].item() == pytest.approx(weighted_mean([(1, 3), (2, 3.0), (3, 3.0), (4, 3.0)], first=1.5), rel=1e-4)


def weighted_mean(steps: list[tuple[int, float]], first: float) -> float:
    """Code 0 after rows 1 and 2 in step 1 and a row 3 in each of the steps 2 to 4."""
    count, total = 0.6 * 2, 0.6 * 2 * first
    for step, value in steps[1:]:
        decay = min(0.4 * step, 0.99)
        count, total = decay * count + (1 - decay), decay * total + (1 - decay) * value
    return total / count


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4, 5)])
def test_batch_norm_is_torchs(shape):
    torch.manual_seed(0)
    ours = BatchNorm(3).double()
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(3).double()
    for parameter, same in zip(ours.parameters(), theirs.parameters(), strict=True):
        parameter.data.normal_()
        same.data.copy_(parameter.data)
    weights = torch.randn(shape, dtype=torch.float64)
    for _ in range(3):
        x = (torch.randn(shape, dtype=torch.float64) * 3 + 5).requires_grad_()
        again = x.detach().clone().requires_grad_()
        expected = theirs(again)
        torch.testing.assert_close(ours(x), expected)
        (ours(x) * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(x.grad, again.grad)
        ours._seen.pop()  # the second of two readings
        ours.after_step(applied=True)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    frozen = FrozenBatchNorm(3).double()
    frozen.load_state_dict(ours.state_dict())
    torch.testing.assert_close(frozen.train()(x), theirs(x))
    assert not list(frozen.parameters())


def test_buffers_stay_in_float32_and_modules_announce_themselves():
    for module in (Codebook(3, 2), BatchNorm(3)):
        start = [buffer.clone() for buffer in module.buffers()]
        assert all(torch.equal(a, b) for a, b in zip(start, module.bfloat16().buffers(), strict=True))
        assert isinstance(module, FollowsSteps)
    assert isinstance(FeatureQueue(2, 2), FollowsSteps) and not isinstance(nn.Linear(1, 1), FollowsSteps)
    x = torch.randn(8, 3, dtype=torch.bfloat16)
    assert BatchNorm(3).bfloat16()(x).dtype == FrozenBatchNorm(3).bfloat16()(x).dtype == torch.bfloat16
