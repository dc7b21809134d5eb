"""The joint model against plain, padded UNITER with the same weights: states, every named loss, every
parameter's gradient of every loss."""

import pytest
import torch
from random_pairs import VIEWS, SIZES, packed, random_pairs, small_one_stream

from benchmarks.plain_uniter import PlainUniter, region_states, word_states
from benchmarks.uniter_pairs import pad
from benchmarks.steps.uniter import engine_name, load_engine_weights
from engine.batch import IMAGE
from engine.objectives import Objectives, PretrainingModule
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.masked_region_classes import MaskedRegionClasses
from engine.objectives.masked_region_features import MaskedRegionFeatures
from engine.objectives.random_matching import RandomMatching

PAIRS = range(7)
CASES = {
    "mlm": ("masked_language", {"mlm": "masked_language"}),
    "mrfr": ("masked_region_features", {"mrfr": "masked_region_features"}),
    "mrc_kl": ("masked_region_classes", {"mrc_kl": "masked_region_classes"}),
    "mrc": ("masked_region_classes", {"mrc": "masked_region_classes"}),
    "itm": ("random_matching", {"itm": "random_matching", "wra": "word_region_alignment"}),
}
DTYPES = [(torch.float64, 1e-9), (torch.float32, 3e-4)]


def same_models(dtype: torch.dtype):
    ours, plain = small_one_stream(dtype=dtype), PlainUniter(SIZES).to(dtype)
    load_engine_weights(plain, ours)
    return ours, plain


def objectives(task: str) -> Objectives:
    return Objectives(
        masked_language=MaskedLanguage(),
        masked_region_features=MaskedRegionFeatures(),
        masked_region_classes=MaskedRegionClasses(targets="hard" if task == "mrc" else "soft"),
        random_matching=RandomMatching(),
    )


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("masked", [None, IMAGE])
def test_states(dtype, tolerance, masked):
    ours, plain = same_models(dtype)
    pairs = random_pairs(PAIRS)
    batch, padded = packed(pairs), pad(pairs, multiple=8)
    assert len({tuple(lengths) for lengths in batch.layout.lengths.tolist()}) > 4, "ragged"
    read = ours.joint_states(batch, VIEWS[masked])
    expected = plain.encode(padded, masked=padded.region_masked if masked == IMAGE else None)
    real = torch.arange(padded.joint_length) < batch.layout.lengths.sum(1, keepdim=True)
    assert relative_error(read.hidden, expected[real]) < tolerance
    pooled = torch.tanh(plain.pooler(expected[:, 0]))
    assert relative_error(ours.pooled(read), pooled) < tolerance
    words = word_states(expected, padded)[padded.real_words]
    regions = region_states(expected, padded)[padded.real_regions]
    segment = batch.layout.token_segment()
    assert relative_error(read.hidden[segment == 0], words) < tolerance
    assert relative_error(read.hidden[segment == 1], regions) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case, recompute, dtype, tolerance):
    task, names = CASES[case]
    ours, plain = same_models(dtype)
    ours.checkpoint_activations(recompute)
    pairs = random_pairs(PAIRS)
    batch = packed(pairs)
    batch.task = (task,)
    total, losses, _ = PretrainingModule(ours, objectives(case).active)(batch)
    expected = plain(pad(pairs, multiple=8), case)
    assert losses.keys() == set(names.values())
    torch.testing.assert_close(total, sum(losses.values()))
    gradients = dict(ours.named_parameters())
    for theirs, name in names.items():
        assert relative_error(losses[name], expected[theirs]) < tolerance, name
        ours.zero_grad()
        plain.zero_grad()
        losses[name].backward(retain_graph=True)
        expected[theirs].backward(retain_graph=True)
        for parameter_name, parameter in plain.named_parameters():
            mine = gradients[engine_name(parameter_name)].grad
            if parameter.grad is None:
                assert mine is None, f"{parameter_name} takes no part in {name}"
                continue
            error = relative_error(mine, parameter.grad)
            assert error < tolerance, f"{name}, {parameter_name}: {error}"
