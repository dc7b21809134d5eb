"""What is special to hard negatives: the distribution, what is excluded, blocks and tiles, memory."""

import pytest
import torch
import vlkernels as vk
from torch.utils._python_dispatch import TorchDispatchMode

from vlkernels.core import dispatch
from vlkernels.ops.hard_negatives import reference, torch_kernels

IMPLS = ("torch", "reference")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(torch_kernels, "BLOCK", 4)
    monkeypatch.setattr(torch_kernels, "TILE_ROWS", 16)
    monkeypatch.setattr(torch_kernels, "TILE_COLUMNS", 24)


def features(pairs, width=8):
    return torch.randn(2, pairs, width).unbind()


@pytest.mark.parametrize("labelled", [False, True])
def test_blocks_and_tiles_draw_what_the_whole_matrix_draws(labelled, small_blocks):
    images, texts = features(101)
    options = {"labels": torch.randint(0, 4, (101,)) if labelled else None, "rng": vk.Rng(3), "stream": 5}
    mine = vk.hard_negatives(images, texts, 2.0, **options, impl="torch")
    true = vk.hard_negatives(images, texts, 2.0, **options, impl="reference")
    assert torch.equal(mine[0], true[0]) and torch.equal(mine[1], true[1])
    assert not torch.equal(mine[0], mine[1])


@pytest.mark.parametrize("pairs", [1, 2, 65, 1000])
def test_any_number_of_pairs(pairs):
    images, texts = (f.double() for f in features(pairs))
    options = {"labels": torch.randint(0, 9, (pairs,)), "rng": vk.Rng(pairs)}
    drawn = [vk.hard_negatives(images, texts, 3.0, **options, impl=impl) for impl in IMPLS]
    for mine, true in zip(*drawn):
        assert torch.equal(mine, true) and mine.shape == (pairs,)
        has_one = (options["labels"] != options["labels"][:, None]).any(1)
        assert torch.equal(mine >= 0, has_one) and (mine < pairs).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_batch_without_a_pair_is_refused(impl):
    with pytest.raises(ValueError, match="a batch must hold at least one pair, got N = 0 on one process"):
        vk.hard_negatives(torch.zeros(0, 4), torch.zeros(0, 4), 1.0, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_draws_follow_the_softmax_of_the_others(impl, small_blocks):
    pairs, draws = 9, 400
    images, texts = features(pairs)
    rng, counts = vk.Rng(11), torch.zeros(2, pairs, pairs)
    for _ in range(draws):
        for direction, index in enumerate(vk.hard_negatives(images, texts, 0.5, rng=rng, impl=impl)):
            counts[direction, torch.arange(pairs), index] += 1
        rng.advance()
    logits = 0.5 * images @ texts.T
    for observed, similarity in zip(counts, (logits, logits.T)):
        expected = draws * similarity.fill_diagonal_(-torch.inf).softmax(1)
        others = ~torch.eye(pairs, dtype=torch.bool)
        assert (observed[~others] == 0).all()
        statistic = ((observed - expected).square() / expected.clamp_min(1e-9))[others].sum()
        freedom = pairs * (pairs - 2)
        assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_labels_and_lone_pairs_are_never_negatives(impl):
    images, texts = features(12)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    for index in vk.hard_negatives(images, texts, 1.0, labels=labels, impl=impl):
        assert index.dtype == torch.int64 and (labels[index] != labels).all()
    for index in vk.hard_negatives(images, texts, 1.0, labels=torch.zeros(12, dtype=torch.int64), impl=impl):
        assert (index == -1).all()
    assert [i.tolist() for i in vk.hard_negatives(images[:1], texts[:1], 1.0, impl=impl)] == [[-1], [-1]]


@pytest.mark.parametrize("impl", IMPLS)
def test_draws_follow_the_samples_not_their_order(impl):
    images, texts = features(40)
    ids, order = torch.randperm(1000)[:40], torch.randperm(40)
    inverse = order.argsort()
    plain = vk.hard_negatives(images, texts, 50.0, rng=vk.Rng(5), sample_ids=ids, impl=impl)
    mixed = vk.hard_negatives(
        images[order], texts[order], 50.0, rng=vk.Rng(5), sample_ids=ids[order], impl=impl
    )
    # A draw so peaked picks the same partner wherever it stands.
    agree = sum((order[other[inverse]] == index).sum() for index, other in zip(plain, mixed))
    assert agree >= 78


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_scales_take_the_nearest(impl):
    images, texts = features(50)
    text_index, image_index = vk.hard_negatives(images, texts, 1e4, impl=impl)
    similarity = (images @ texts.T).fill_diagonal_(-torch.inf)
    assert torch.equal(text_index, similarity.argmax(1)) and torch.equal(image_index, similarity.argmax(0))


@pytest.mark.parametrize("count", [1, 2, 3, 31, 32, 33, 1000])
def test_sums_by_doubling_are_running_sums(count):
    weights = torch.rand(3, count)
    torch.testing.assert_close(reference.sums_by_doubling(weights).double(), weights.double().cumsum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_of_a_card_draw_alike(impl, monkeypatch, small_blocks):
    images, texts = features(101)
    options = {"labels": torch.randint(0, 4, (101,)), "rng": vk.Rng(3), "impl": impl}
    usual = vk.hard_negatives(images, texts, 2.0, **options)
    for module in (reference, torch_kernels):
        monkeypatch.setattr(module, "running_sums", reference.sums_by_doubling)
    for mine, true in zip(vk.hard_negatives(images, texts, 2.0, **options), usual, strict=True):
        assert torch.equal(mine, true)


def test_what_has_no_weight_is_never_picked(monkeypatch):
    """Sums of any order may fall or grow by a rounding where nothing is added."""
    weights = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]]).expand(4, -1)
    rounded = torch.tensor([[1e-7, 1.0, 1.0 + 1e-6, 2.0, 2.0 + 1e-6]]).expand(4, -1)
    monkeypatch.setattr(reference, "running_sums", lambda _: rounded)
    thresholds = torch.tensor([0.0, 1.0, 1.0 + 5e-7, 2.0 + 5e-7])
    assert reference.pick(weights, thresholds).tolist() == [1, 3, 3, 3]


class CalledOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_no_sum_that_a_card_refuses_in_deterministic_mode():
    """Meta tensors stand for a card's: PyTorch has no ``cumsum`` of floats there that repeats itself."""
    images, texts = (f.to("meta") for f in features(70))
    scale, draws = torch.ones((), device="meta"), torch.rand(70, device="meta")
    with CalledOps() as called:
        torch_kernels._draw_by_spans(images, texts, scale, 0, None, draws)
        reference.pick(torch.rand(70, 70, device="meta"), draws)
    assert called.names and not [name for name in called.names if "cumsum" in name]


def test_steps_and_streams_draw_anew():
    images, texts = features(64)
    rng = vk.Rng(1)
    first = vk.hard_negatives(images, texts, 0.1, rng=rng, stream=1)[0]
    assert torch.equal(first, vk.hard_negatives(images, texts, 0.1, rng=rng, stream=1)[0])
    assert not torch.equal(first, vk.hard_negatives(images, texts, 0.1, rng=rng, stream=2)[0])
    rng.advance()
    assert not torch.equal(first, vk.hard_negatives(images, texts, 0.1, rng=rng, stream=1)[0])


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_tensor_has_all_similarities(small_blocks):
    images, texts = features(400, width=2)
    state, scale = vk.Rng(0).state, torch.tensor(1.0)
    with LargestTensor() as largest:
        torch_kernels.hard_negatives(images, texts, scale, None, state, 0, None, "", None)
    assert largest.numel <= 16 * 400


def test_auto_takes_tiles_for_many_pairs():
    for pairs, expected in ((128, "reference"), (6000, "torch")):
        with dispatch.recorded() as served:
            vk.hard_negatives(*features(pairs, width=2), 1.0)
        assert served == [("hard_negatives", expected)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_features": torch.zeros(5, 3)}, r"text_features must be \[N, D\] = \[4, 3\], got \[5, 3\]"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be \[N\] = \[4\], got \[3\]"),
        ({"sample_ids": torch.zeros(4)}, "sample_ids must be one of int64, int32, got float32"),
        ({"rank_counts": (3,)}, r"rank_counts must be 4 at rank 0, the rows it has, got \[3\]"),
    ],
)
def test_mistakes_are_one_clear_line(change, message):
    arguments = {"image_features": torch.zeros(4, 3), "text_features": torch.zeros(4, 3), "logit_scale": 1.0}
    with pytest.raises(ValueError, match=message):
        vk.hard_negatives(**arguments | change)
