"""Twenty steps of the quickstart on the fused CPU ops end where twenty steps on the references end."""

import pytest
import torch

import vlkernels as vk
from engine.build import build_model
from engine.data import load_training_sets, make_tokenizer, training_stream
from engine.objectives import PretrainingModule
from engine.training.command_line import parse
from vlkernels.core import dispatch, native
from vlkernels.testing import error_rule

STEPS, BATCH, LEARNING_RATE = 20, 32, 0.05
OPTIONS = [f"--model.{part}.dropout=0.1" for part in ("image", "text", "fusion")]
FUSED = {  # no op of the model is left out
    "attention": "cpp",
    "attention_qkvpacked": "cpp",
    "contrastive_loss": "torch",
    "embed_layer_norm": "cpp",
    "hard_negatives": "torch",
    "layer_norm": "cpp",
    "linear": "cpp",
    "linear_cross_entropy": "cpp",
    "segment_mean": "cpp",
    "take_rows": "cpp",
}


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Configuration, vocabulary and the batches of twenty steps, with dropout on."""
    cache = str(tmp_path_factory.mktemp("cache"))
    recipe = ["--config=engine/recipes/quickstart.yaml", f"--data.cache={cache}", f"--train.global_batch={BATCH}"]
    config = parse([*recipe, *OPTIONS])
    sets = load_training_sets(config)
    tokenizer = make_tokenizer(config, sets)
    stream = training_stream(config, sets, tokenizer, 0, 1, step=0, samples_seen=0)
    return config, tokenizer.vocab_size, [next(stream)[0] for _ in range(STEPS)]


@pytest.fixture
def small_calls_too(monkeypatch):
    """`auto` leaves small calls to PyTorch where that is faster; here every call takes the fused op."""

    def first_that_runs(op, impl, implementations, device_type, facts):
        names = [i.name for i in implementations if i.name != "reference" and i.refusal_on(device_type) is None]
        return names[0] if impl == "auto" else impl

    monkeypatch.setattr(dispatch, "_choose", first_that_runs)


def train(windows, impl, dtype):
    """Losses of every step and the weights after the last, by plain SGD; and which implementation served each op."""
    config, vocab_size, batches = windows
    config.impl = impl
    torch.manual_seed(0)
    module = PretrainingModule(build_model(config, vocab_size), config.objectives.active).to(dtype)
    losses = []
    with vk.recorded() as served:
        for batch in batches:
            batch.image.values = batch.image.values.to(dtype)
            batch.normalizers = {name: torch.tensor(1 / count, dtype=dtype) for name, count in batch.counts.items()}
            loss, _, _ = module(batch)
            loss.backward()
            losses.append(loss.detach())
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter -= LEARNING_RATE * parameter.grad
                    parameter.grad = None
            module.model.rng.advance()
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    return torch.stack(losses), weights, dict(served)


@pytest.mark.skipif(native.load() is not None, reason="the compiled library is not built")
def test_twenty_steps_agree_within_the_error_rule(windows, small_calls_too):
    true_losses, true_weights, _ = train(windows, "reference", torch.float64)
    eager_losses, eager_weights, eager_served = train(windows, "reference", torch.float32)
    losses, weights, served = train(windows, "auto", torch.float32)
    assert set(eager_served.values()) == {"reference"}
    assert served == FUSED
    assert not torch.equal(losses, eager_losses)  # other code ran
    error_rule.assert_close("losses", losses, eager_losses, true_losses)
    error_rule.assert_close("weights", weights, eager_weights, true_weights)
