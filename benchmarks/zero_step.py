"""What the engine and its ZeRO stages add to a packed step: on a CPU on two ranks, else on one card and on two.

    python -m benchmarks.zero_step [--device cpu|cuda] [--system NAME]

Each rank has a share of a random batch. Steps of a stage take turns with the same step of the same model without
DeepSpeed, in which nothing is reduced. Bytes are those that benchmarks/scaling.py counts, which a test compares with runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import scaling
from benchmarks.provenance import RESULTS, store
from benchmarks.steps.shapes import systems
from benchmarks.steps.system import System
from benchmarks.timing import clock_of, summary
from benchmarks.train_step import Step
from engine.config import Config
from engine.objectives import Objectives
from engine.objectives.masked_language import MaskedLanguage
from engine.sections import Optimizer, Train, Zero
from engine.training import zero
from engine.training.optimizer import make_optimizer

ALONE = "without DeepSpeed"
ROUNDS = 3


class EngineStep:
    """The same step by the engine, with its own optimizer and clipping."""

    def __init__(self, config: Config, model: torch.nn.Module, ranks: zero.Ranks):
        optimizer = make_optimizer(config.optimizer, model.named_parameters(), ranks.device)
        self.engine = zero.Engine(config, model, optimizer, ranks)

    def __call__(self, batch: Any) -> None:
        self.engine.backward(self.engine(batch))
        self.engine.step()


def config_of(device: str, world: int, stage: int) -> Config:
    """Precision as on a run: float32 on a CPU, bfloat16 with float32 weights of the optimizer on a card."""
    return Config(
        device=device,
        precision="bf16" if device == "cuda" else "fp32",
        objectives=Objectives(masked_language=MaskedLanguage()),  # of a run; the systems bring their own losses
        optimizer=Optimizer(lr=1e-5),
        train=Train(global_batch=2 * world, max_steps=1),
        zero=Zero(stage),
    )


WORLDS = {"cpu": (2,), "cuda": (1, 2)}
STAGES = {"cpu": (0, 1, 2, 3), "cuda": (1, 2, 3)}  # DeepSpeed's stage 0 in bfloat16 makes a wrong first update


def on_rank(system: System, device: str, stages: Sequence[int]) -> dict[str, Any]:
    """The stages, one after another: seconds beside those of the step alone, and what it sends and holds."""
    first = zero.join(config_of(device, int(os.environ["WORLD_SIZE"]), 1))
    share = max(2, system.pairs // first.world)
    random = np.random.default_rng(first.rank)
    samples = [system.sample(lengths, random) for lengths in system.lengths(share, random).tolist()]
    batch = system.packed(samples).to(first.device)
    found: dict[str, Any] = {"samples": share * first.world, "tokens": system.tokens(batch)[0], "stages": {}}
    for stage in stages:
        found["stages"][f"ZeRO {stage}"] = timed(system, batch, config_of(device, first.world, stage), first)
        gc.collect()
    return found


def timed(system: System, batch: Any, config: Config, ranks: zero.Ranks) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    alone = Step(system.model().to(ranks.device, dtype))
    model = system.model()
    weights = tuple(scaling.Weight(p.numel(), p.dim() >= 2) for p in model.parameters())
    steps = {ALONE: alone, "engine": EngineStep(config, model, ranks)}
    clock = clock_of(ranks.device.type)

    def one_round() -> dict[str, Any]:
        ranks.barrier()
        return {name: clock.measure(name, lambda step=step: step(batch)) for name, step in steps.items()}

    one_round()
    rounds = [one_round() for _ in range(ROUNDS)]
    run = scaling.Run((scaling.Part("all", weights),), config.zero.stage, ranks.world, config.precision)
    return {
        "seconds": {name: asdict(summary([each[name] for each in rounds])) for name in steps},
        "times_as_long": statistics.median(each["engine"].seconds / each[ALONE].seconds for each in rounds),
        "sent_bytes": scaling.wire(run),
        "state_bytes": scaling.model_states(run, ranks.rank),
    }


def start(name: str, size: str, device: str, world: int, stages: Sequence[int]) -> dict[str, Any]:
    """The result of rank 0 of `world` processes on this host."""
    spawn = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        given = name, size, device, tuple(stages), world, port, folder
        ranks = [spawn.Process(target=work, args=(rank, *given)) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        codes = [process.exitcode for process in ranks]
        if any(codes):
            raise RuntimeError(f"{name}: {world} ranks ended with {codes}")
        return json.loads((Path(folder) / "0.json").read_text())


def work(rank: int, name: str, size: str, device: str, stages: Sequence[int], world: int, port: int, folder: str) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in own.items()}, MASTER_ADDR="127.0.0.1")
    (system,) = (system for system in systems(size) if system.name == name)

    def main() -> int:
        (Path(folder) / f"{rank}.json").write_text(json.dumps(on_rank(system, device, stages)))
        return 0

    zero.leave(main)


def show(title: str, found: dict[str, Any]) -> None:
    print(f"{title}, {found['samples']} samples")
    for stage, taken in found["stages"].items():
        alone, engine = (taken["seconds"][name]["median"] for name in (ALONE, "engine"))
        sent, held = (sum(taken[name].values()) / 2**20 for name in ("sent_bytes", "state_bytes"))
        times = f"{engine:.3f} s, {ALONE} {alone:.3f} s: {taken['times_as_long']:.2f} times as long"
        print(f"  {stage}: {times}; a rank sends {sent:,.1f} MiB and holds {held:,.0f} MiB of model states", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zero_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=("tiny", "small", "full"), help="default: small on a CPU, full on a card")
    parser.add_argument("--system", default="CLIP", help="the begin of its name")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder the results are appended to")
    options = parser.parse_args(arguments)
    size = options.size or ("full" if options.device == "cuda" else "small")
    system = next((s for s in systems(size) if s.name.lower().startswith(options.system.lower())), None)
    if system is None:
        parser.error(f"--system: none begins with {options.system}")
    most = torch.cuda.device_count() if options.device == "cuda" else os.cpu_count() or 1
    for world in (world for world in WORLDS[options.device] if world <= most):
        found = start(system.name, size, options.device, world, STAGES[options.device])
        title = f"{system.name} step, {world} rank{'s' if world > 1 else ''}"
        show(title, found)
        row = {"benchmark": title, "layers": system.layers, "ranks": world, **found}
        store("zero_step", row, options.device, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
