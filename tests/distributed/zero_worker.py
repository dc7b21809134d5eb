"""One rank of test_zero_parity: SGD under each ZeRO stage; prints losses and the weights after every step."""

import json
import sys

import torch
from standin import StandInModule, small_config, stream

from engine.training import zero
from engine.training.step import agree, run_window


def curve(stage: int, accumulation: int, alternate: bool, steps: int) -> list[dict]:
    """Mean loss and whole weights after each step."""
    config = small_config(stage, accumulation=accumulation, global_batch=8)
    ranks = zero.join(config)
    module = StandInModule()
    optimizer = torch.optim.SGD(module.parameters(), lr=config.optimizer.lr)
    engine = zero.Engine(config, module, optimizer, ranks)
    windows = stream(config, ranks.rank, ranks.world, alternate=alternate)
    points = []
    for _ in range(steps):
        window = next(windows)
        agreement = agree(window, ranks, stop=False)
        result = run_window(engine, window, agreement.counts, ranks, engine.module.model.rng)
        assert result.applied, (stage, accumulation, alternate, engine.gradient_norm)
        loss = ranks.mean(result.values["loss"].clone()).item()
        with engine.whole_module() as whole:
            weights = {name: p.flatten().tolist() for name, p in whole.named_parameters()}
        points.append({"loss": loss, "weights": weights, "gradient_norm": engine.gradient_norm})
    return points


def main() -> int:
    cases = json.loads(sys.argv[1])
    print(json.dumps({name: curve(**case) for name, case in cases.items()}))
    return 0


if __name__ == "__main__":
    zero.leave(main)
