"""The plain UNITER that the engine is compared with: published sizes, order of tokens, padding without
influence."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.plain_uniter import TASKS, PlainUniter, Sizes, bert, gather_index, optimal_transport
from benchmarks.uniter_pairs import coco_like_lengths, pad, random_batches, random_pair, token_bucket_batches

TINY = Sizes(bert(32, 2, 4, dropout=0.0), vocab_size=120, max_positions=24, feature_values=24, classes=11)
LENGTHS = [(5, 3), (9, 1), (3, 7), (6, 6)]


@pytest.fixture(scope="module")
def pairs():
    random = np.random.default_rng(0)
    return [random_pair(length, TINY, random) for length in LENGTHS]


@pytest.fixture(scope="module")
def model():
    """Redrawn, vectors too: a young model hides lost biases and swapped norms."""
    torch.manual_seed(0)
    model = PlainUniter(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.double()


def published_parameters(vocab: int, positions: int, d: int, layers: int, features: int, classes: int) -> int:
    """UNITER's, without the row of zeros that its mask embedding keeps for regions that are not masked."""
    norm = 2 * d
    square = d * d + d
    text = vocab * d + positions * d + 2 * d + norm
    regions = (features * d + d + norm) + (7 * d + d + norm) + features + norm
    layer = 4 * square + norm + (d * 4 * d + 4 * d) + (4 * d * d + d) + norm
    masked_language = square + norm + vocab
    region_features = square + norm + features
    region_classes = square + norm + d * classes + classes
    matching = square + 2 * d + 2
    return text + regions + layers * layer + masked_language + region_features + region_classes + matching


def test_parameter_count_is_uniter_bases():
    with torch.device("meta"):
        base = PlainUniter(Sizes())
    count = sum(parameter.numel() for parameter in base.parameters())
    assert count == published_parameters(28_996, 512, 768, 12, 2048, 1601) == 112_936_839
    assert sum(p.numel() for p in base.transformer.parameters()) == 85_054_464


def test_regions_follow_their_caption(pairs):
    batch = pad(pairs, multiple=8)
    longest_text = 9
    assert batch.joint_length == 16
    assert batch.text_ids.shape == (4, longest_text) and batch.features.shape == (4, 7, 24)
    for row, (words, regions) in zip(gather_index(batch).tolist(), LENGTHS, strict=True):
        assert row[:words] == list(range(words))
        assert row[words : words + regions] == list(range(longest_text, longest_text + regions))


@pytest.mark.parametrize("multiple", [1, 8])
def test_padding_changes_no_hidden_state(model, pairs, multiple):
    together = model.encode(pad(pairs, multiple))
    for hidden, pair, length in zip(together, pairs, LENGTHS, strict=True):
        alone = model.encode(pad([pair]))[0]
        assert len(alone) == sum(length)
        torch.testing.assert_close(hidden[: sum(length)], alone, rtol=1e-10, atol=1e-10)


def test_one_modality_alone(model, pairs):
    """No regions, or no caption: what is left is embedded and read by itself."""
    batch = pad(pairs[3:])
    nothing = torch.zeros(1, dtype=torch.long)
    no_regions = {"region_counts": nothing, "features": batch.features[:, :0], "boxes": batch.boxes[:, :0]}
    text = replace(batch, joint_length=6, **no_regions)
    expected = model.transformer(model.text_embedder(batch.text_ids), None)
    torch.testing.assert_close(model.encode(text), expected, rtol=1e-10, atol=1e-10)
    image = replace(batch, text_lengths=nothing, text_ids=batch.text_ids[:, :0], joint_length=6)
    kind = model.text_embedder.types.weight[1]
    expected = model.transformer(model.region_embedder(batch.features, batch.boxes, kind, None), None)
    torch.testing.assert_close(model.encode(image), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("task", TASKS)
def test_a_loss_is_the_weighted_mean_of_its_samples(model, pairs, task):
    """Weighted by what the task averages over, so that nothing of the padding enters."""
    weights = {"mlm": lambda pair: int((pair.word_targets >= 0).sum()), "itm": lambda pair: 1}
    weigh = weights.get(task, lambda pair: int(pair.region_masked.sum()))
    together = model(pad(pairs, multiple=8), task)
    for name, loss in together.items():
        alone = [(weigh(pair), model(pad([pair]), task)[name]) for pair in pairs]
        expected = sum(weight * value for weight, value in alone) / sum(weight for weight, _ in alone)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        assert loss.isfinite() and loss != 0


def test_every_task_trains_its_own_parameters(model, pairs):
    heads = {
        "mlm": {"masked_language_head"},
        "mrfr": {"region_feature_head"},
        "mrc": {"region_class_head"},
        "mrc_kl": {"region_class_head"},
        "itm": {"pooler", "matching_head"},
    }
    for task in TASKS:
        model.zero_grad(set_to_none=True)
        sum(model(pad(pairs), task).values()).backward()
        trained = {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None}
        assert trained == {"text_embedder", "region_embedder", "transformer"} | heads[task]
        hidden_regions = model.region_embedder.mask_row.grad is not None
        assert hidden_regions == (task not in ("mlm", "itm")), "one modality is masked per task"


def test_transport_of_one_word_is_its_mean_cost():
    """All of the word's mass goes to the regions evenly, whatever the costs; padding has none."""
    words = torch.tensor([[[1.0, 0.0], [9.0, 9.0]]])
    regions = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [5.0, 5.0]]])
    real_words, real_regions = torch.tensor([[True, False]]), torch.tensor([[True, True, True, False]])
    distance = optimal_transport(words, regions, real_words, real_regions)
    torch.testing.assert_close(distance, torch.tensor([(0.0 + 1.0 + 2.0) / 3]))


def test_transport_takes_the_cheap_way():
    """Two words, two regions alike in turn: after 50 steps the plan is the matching, and costs nothing."""
    words, regions = torch.eye(2)[None], torch.eye(2).flip(0)[None]
    real = torch.ones(1, 2, dtype=torch.bool)
    assert float(optimal_transport(words, regions, real, real)) == pytest.approx(0.0, abs=1e-6)
    # One step weighs the wrong place by exp(-1 / beta): 1 / (1 + e^2) of the mass is still there.
    first = float(optimal_transport(words, regions, real, real, iterations=1))
    assert first == pytest.approx(1 / (1 + math.exp(2)), rel=1e-5)


def test_lengths_are_cocos():
    lengths = coco_like_lengths(20_000, np.random.default_rng(0))
    words, regions = lengths[:, 0] - 2, lengths[:, 1]
    assert (int(words.min()), int(words.max())) == (10, 20) and 10 <= regions.min() and regions.max() <= 100
    assert float(regions.double().mean()) == pytest.approx(40, abs=0.5)
    assert regions.median() < 40, "a long tail"


def test_token_buckets():
    lengths = coco_like_lengths(20_000, np.random.default_rng(0)).sum(1)
    batches = token_bucket_batches(lengths, 2048, np.random.default_rng(1))
    used = torch.cat(batches)
    assert len(used.unique()) == len(used) > 0.99 * 20_000
    for batch in batches:
        assert len(batch) % 8 == 0 and len(batch) * int(lengths[batch].max()) <= 2048
    true, padded = (int(sum(f(lengths[b]) for b in batches)) for f in (torch.sum, lambda n: n.max() * len(n)))
    assert true > 0.97 * padded
    shuffled = random_batches(20_000, 24, np.random.default_rng(1))
    shares = [float(lengths[batch].double().mean() / lengths[batch].max()) for batch in shuffled]
    assert true / padded > 1.4 * sum(shares) / len(shares)
    with pytest.raises(ValueError, match="token_budget must hold 8 pairs of 1.. tokens, got 500"):
        token_bucket_batches(lengths, 500, np.random.default_rng(1))
