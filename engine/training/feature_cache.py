"""The feature cache: losses over all pairs of a step, in the memory of one micro-batch (Gao et al. 2021, GradCache).

First every micro-batch is read without a graph, and only its features are kept. The losses are taken over the features of
the whole step, on all ranks, and differentiated by them. Then `run_window` reads every micro-batch again, with a graph, and
its backward takes the gradients of its features on to the parameters. Both passes draw alike: `vk.Rng` by sample, and
torch's generators because their states are put back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.batch import Batch
from engine.objectives import StepLoss
from engine.training.generators import generator_states, restore_generators
from engine.training.zero import Engine


@dataclass(frozen=True)
class FirstReading:
    """What a micro-batch's first reading left for the second; nothing where there was none."""

    step_losses: Mapping[str, StepLoss] = field(default_factory=dict)
    generators: Mapping[str, Tensor] = field(default_factory=dict)

    def draw_alike(self, device: torch.device) -> None:
        """Put torch's generators back to where the first reading began."""
        if self.generators:
            restore_generators(self.generators, device)


def read_ahead(engine: Engine, window: list[Batch], device: torch.device) -> list[FirstReading]:
    """Take the batch-coupled losses of a window. A micro-batch that is alone has all its pairs anyway."""
    coupled = engine.module.batch_coupled(window[0]) if len(window) > 1 else []
    if not coupled:
        return [FirstReading() for _ in window]
    generators, features = [], []
    for batch in window:
        generators.append(generator_states(device))
        with torch.no_grad():
            features.append(engine(batch.to(device, non_blocking=True), only_features=True))
    losses = {name: engine.module.over_the_step(name, [part[name] for part in features]) for name in coupled}
    return [
        FirstReading({name: parts[number] for name, parts in losses.items()}, states)
        for number, states in enumerate(generators)
    ]
