"""Steps under the engine on two ranks: what is timed is there, and what is sent is what the model of scaling counts."""

import torch

from benchmarks import scaling, zero_step
from benchmarks.steps.shapes import systems

CLIP = next(system for system in systems("tiny") if system.name.startswith("CLIP"))


def test_a_stage_beside_the_step_without_deepspeed(capsys):
    found = zero_step.start(CLIP.name, "tiny", "cpu", world=2, stages=(2,))
    assert found["samples"] == CLIP.pairs and found["tokens"] > 0
    (taken,) = found["stages"].values()
    assert all(timing["median"] > 0 and timing["runs"] == zero_step.ROUNDS for timing in taken["seconds"].values())
    assert taken["seconds"].keys() == {zero_step.ALONE, "engine"} and taken["times_as_long"] > 0
    with torch.device("meta"):
        numel = sum(parameter.numel() for parameter in CLIP.model().parameters())
    assert taken["sent_bytes"]["gradients"] == scaling.all_reduce_bytes(4 * numel, 2)
    zero_step.show("CLIP", found)
    assert "ZeRO 2" in capsys.readouterr().out
