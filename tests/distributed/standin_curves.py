"""The stand-in model under each ZeRO stage, and the same in plain PyTorch."""

import torch
from standin import StandInModule, small_config, stream

from engine.training import zero
from engine.training.step import agree, normalizers, run_window

STEPS = 4
KINDS = {
    "accumulated": {"accumulation": 2, "alternate": False},
    "alternating": {"accumulation": 1, "alternate": True},
}


def plain_curve(alternate: bool) -> list[dict]:
    """The definition: one process, one batch, torch's SGD. Loss, gradient norm and weights."""
    config = small_config()
    module = StandInModule()
    optimizer = torch.optim.SGD(module.parameters(), lr=config.optimizer.lr)
    points = []
    windows = stream(config, alternate=alternate)
    for _ in range(STEPS):
        (batch,) = next(windows)
        batch.normalizers = normalizers(batch.counts, 1, torch.device("cpu"))
        loss, _, _ = module(batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm()
        optimizer.step()
        module.model.rng.advance()
        points.append({"loss": loss.item(), "gradient_norm": norm.item(), "weights": weights_of(module)})
    return points


def zero_curve(stage: int, accumulation: int, alternate: bool) -> list[dict]:
    """The same through the engine, on all ranks."""
    config = small_config(stage, accumulation=accumulation)
    ranks = zero.join(config)
    module = StandInModule()
    optimizer = torch.optim.SGD(module.parameters(), lr=config.optimizer.lr)
    engine = zero.Engine(config, module, optimizer, ranks)
    windows = stream(config, ranks.rank, ranks.world, alternate=alternate)
    points = []
    for _ in range(STEPS):
        window = next(windows)
        agreement = agree(window, ranks, stop=False)
        result = run_window(engine, window, agreement.counts, ranks, engine.module.model.rng)
        assert result.applied
        loss = ranks.mean(result.values["loss"].clone()).item()
        with engine.whole_module() as whole:
            points.append({"loss": loss, "gradient_norm": engine.gradient_norm, "weights": weights_of(whole)})
    return points


def weights_of(module: torch.nn.Module) -> dict[str, list[float]]:
    return {name: p.flatten().tolist() for name, p in module.named_parameters()}
