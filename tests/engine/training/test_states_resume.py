"""States that are no parameters survive a run's end, whatever holds them; half precision has a master of the copies."""

import pytest
import torch
from standin import small_config, stream
from states_curves import MIXED, SGD, zero_engine

from engine.training import zero
from engine.training.checkpoint import Checkpoints, Progress
from engine.training.step import agree, run_window


def steps(engine, ranks, windows, count: int) -> None:
    for _ in range(count):
        window = next(windows)
        run_window(engine, window, agree(window, ranks, stop=False).counts, ranks, engine.module.rng)


def states(engine: zero.Engine) -> dict[str, torch.Tensor]:
    with engine.whole_module() as whole:
        found = {name: value.clone() for name, value in whole.state_dict().items()}
    masters = [piece.clone() for part in engine.averages.masters for piece in part]
    return found | {f"master {number}": piece for number, piece in enumerate(masters)}


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_resume_is_exact(tmp_path, stage, precision):
    """Those of an optimizer with two rules as well."""
    config = small_config(stage, precision=precision, optimizer=MIXED, accumulation=2, output=str(tmp_path))
    engine, ranks = zero_engine(config)
    windows = stream(config)
    steps(engine, ranks, windows, 3)
    checkpoints = Checkpoints(config, ranks, tmp_path)
    checkpoints.save(engine, engine.module.rng, Progress(step=3))
    steps(engine, ranks, windows, 2)
    straight = states(engine)

    resumed, _ = zero_engine(config)
    checkpoints.load(checkpoints.newest(), resumed, resumed.module.rng)
    steps(resumed, ranks, stream(config, position=3 * config.train.global_batch), 2)
    assert states(resumed).keys() == straight.keys()
    assert all(torch.equal(value, straight[name]) for name, value in states(resumed).items())


@pytest.mark.parametrize("stage", [1, 3])
def test_copies_in_half_precision_follow_a_float32_master(stage):
    """Without it a hundredth of the way to the source is lost in rounding, step after step."""
    engine, ranks = zero_engine(small_config(stage, precision="bf16", optimizer=SGD))
    (copy,) = engine.averages.moving
    copy.momentum = 0.999
    pairs = list(copy.parameter_pairs())
    with torch.no_grad():
        for own, source in pairs:
            for piece, followed in zip(zero.pieces_on_this_rank(own), zero.pieces_on_this_rank(source), strict=True):
                piece.fill_(1.0)
                followed.fill_(1.25)
    for _ in range(1000):
        engine.averages.follow()
    expected = 1.25 - 0.25 * 0.999**1000
    found = zero.pieces_on_this_rank(pairs[0][0])[0].float()
    assert (found - expected).abs().max() < 2**-8, found
    assert {buffer.dtype for buffer in engine.module.codebook.buffers()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_skipped_moves_no_state(stage):
    engine, ranks = zero_engine(small_config(stage, optimizer=SGD))
    windows = stream(small_config())
    steps(engine, ranks, windows, 1)
    before = states(engine)
    window = next(windows)
    agreement = agree(window, ranks, stop=False)
    window[0].x = window[0].x * float("nan")
    assert not run_window(engine, window, agreement.counts, ranks, engine.module.rng).applied
    assert all(torch.equal(value, before[name]) for name, value in states(engine).items())
