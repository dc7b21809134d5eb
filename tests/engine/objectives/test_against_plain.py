"""The objectives against a plain, padded PyTorch model with the same weights: losses and every parameter's
gradient."""

import pytest
import torch
from random_batch import THREE, VOCAB, random_batch, small_config, small_model

from benchmarks.plain_quickstart import PaddedPairs, PlainModel
from engine.objectives import PretrainingModule, matching

PAIRS = range(7)
HARD_TEXTS, HARD_IMAGES = torch.tensor([1, 2, 0, 0, 6, 4, 2]), torch.tensor([3, 0, 1, 6, 0, 1, 0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients(monkeypatch, dtype, tolerance, recompute):
    monkeypatch.setattr(matching, "draw_negatives", lambda *_: (HARD_TEXTS, HARD_IMAGES))
    packed = small_model(dtype=dtype)
    packed.checkpoint_activations(recompute)
    plain = PlainModel(small_config(), VOCAB).to(dtype)
    plain.load_state_dict(packed.state_dict())
    batch = random_batch(PAIRS)
    assert len(set(batch.image_layout.lengths.flatten().tolist())) > 2

    total, losses, _ = PretrainingModule(packed, THREE.active)(batch)
    total.backward()
    expected = plain(PaddedPairs.of(batch), (HARD_TEXTS, HARD_IMAGES))
    sum(expected.values()).backward()

    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name].to(loss.dtype), rtol=tolerance, atol=tolerance)
    theirs = dict(plain.named_parameters())
    for name, parameter in packed.named_parameters():
        scale = theirs[name].grad.abs().max()
        assert scale > 1e-9, name
        error = (parameter.grad - theirs[name].grad).abs().max() / scale
        assert error < tolerance, f"{name}: {error}"
