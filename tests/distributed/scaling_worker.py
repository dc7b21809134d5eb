"""The ranks of test_scaling: what a step of small towers sends and holds, by ZeRO stage, training dtype and loss exchange."""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import vlkernels as vk
from launch import free_port
from standin import small_config
from torch import Tensor, nn

from benchmarks.scaling import Part, Weight, all_reduce_bytes
from engine.sections import Optimizer
from engine.training import zero
from engine.training.optimizer import make_optimizer

WORLDS = (1, 2, 4)
SAMPLES, WIDTH, LOSS_WIDTH, STEPS = 3, 331, 5, 3
Case = tuple[int, str, int, str, int | None]  # stage, dtype, micro-steps, exchange, stage 3's reuse distance if not the engine's
CASES: list[Case] = [
    (0, "fp32", 2, "gather", None),
    (1, "fp32", 1, "ring", None),
    (1, "bf16", 2, "gather", None),
    (2, "fp32", 2, "gather", None),
    (2, "bf16", 2, "ring", None),
    (3, "fp32", 1, "gather", None),
    (3, "bf16", 2, "ring", None),
    (3, "fp32", 2, "ring", 2 * WIDTH**2),  # far enough that the first matrix alone is gathered again for its backward
    (3, "fp32", 1, "gather", 10**9),  # too far
]


class Towers(nn.Module):
    """Parameters above and below what stage 3 keeps whole, of odd sizes, some of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.teacher = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.image, self.text = nn.Linear(WIDTH, LOSS_WIDTH), nn.Linear(WIDTH, LOSS_WIDTH)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, wire: Wire, over_ranks: dict[str, Any]) -> Tensor:
        x = x.to(self.norm.weight.dtype)
        hidden = self.norm(torch.tanh(self.second(torch.tanh(self.first(x)))))
        with torch.no_grad():
            taught = self.teacher(x)
        hidden = hidden + taught
        image, text = self.image(hidden), self.text(hidden)  # parameters are gathered for and ahead of them
        with wire.of_loss():
            return vk.contrastive_loss(image, text, self.scale.float(), **over_ranks)


UNFORESEEN = ("reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all_single", "all_to_all", "gather", "scatter")


class Wire:
    """Bytes of the collectives of torch.distributed that pass while it listens, counted as rings send them."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.listening, self.in_loss = False, False
        self._wrap("all_reduce", lambda tensor: ("norm" if tensor.numel() == 1 else "gradients", _reduced(tensor.nbytes)))
        self._wrap("all_gather_into_tensor", lambda _, own: ("parameters", _to_others(own.nbytes)))
        self._wrap("reduce_scatter_tensor", lambda own, _: ("gradients", _to_others(own.nbytes)))
        self._wrap("batch_isend_irecv", lambda flights: ("ring", _sent(flights)))
        for name in UNFORESEEN:
            self._wrap(name, lambda *_: ("unforeseen", 1))

    def _wrap(self, name: str, count: Callable[..., tuple[str, int]]) -> None:
        function = getattr(dist, name)
        signature = inspect.signature(function)

        def counted(*given: Any, **options: Any) -> Any:
            if self.listening:
                tensors = list(signature.bind(*given, **options).arguments.values())[: count.__code__.co_argcount]
                kind, nbytes = count(*tensors)
                self.sent["loss" if self.in_loss else kind] += nbytes
            return function(*given, **options)

        setattr(dist, name, counted)

    @contextlib.contextmanager
    def of_loss(self) -> Iterator[None]:
        self.in_loss = True
        yield
        self.in_loss = False


def _reduced(nbytes: int) -> int:
    return all_reduce_bytes(nbytes, dist.get_world_size())


def _to_others(nbytes: int) -> int:
    return (dist.get_world_size() - 1) * nbytes


def _sent(flights: list[dist.P2POp]) -> int:
    return sum(flight.tensor.nbytes for flight in flights if flight.op is dist.isend)


def weights_of(module: nn.Module) -> tuple[Weight, ...]:
    return tuple(Weight(p.numel(), p.dim() >= 2, p.requires_grad) for p in module.parameters())


def run_of(case: Case, ranks: int, model: ModuleType) -> Any:
    """The same as a run of the model, or of a mutant of it."""
    stage, dtype, micro_steps, exchange, reuse = case
    parts = (Part("towers", weights_of(Towers())),)
    loss = {"exchange": exchange, "loss_width": LOSS_WIDTH}
    return model.Run(parts, stage, ranks, dtype, SAMPLES, micro_steps, reuse_distance=reuse, **loss)


def with_reuse_distance(elements: int | None) -> Callable[..., dict]:
    """The engine's sizes, or with another distance."""
    made = zero.zero_sizes
    return lambda *counts: made(*counts) | ({} if elements is None else {"stage3_max_reuse_distance": elements})


def measured(case: Case, wire: Wire) -> dict[str, dict[str, int]]:
    """Of the third step: moments exist, and stage 3 has compared the traces of the first on all ranks."""
    stage, dtype, micro_steps, exchange, reuse = case
    optimizer = Optimizer(kind="adamw", lr=1e-3, clip=0.5)
    ranks = zero.join(small_config(stage))
    batch = SAMPLES * micro_steps * ranks.world
    config = small_config(stage, accumulation=micro_steps, global_batch=batch, precision=dtype, optimizer=optimizer)
    module = Towers()
    rule = make_optimizer(optimizer, module.named_parameters(), ranks.device)
    with mock.patch.object(zero, "zero_sizes", with_reuse_distance(reuse)):
        engine = zero.Engine(config, module, rule, ranks)
    group = dist.new_group() if ranks.world > 1 else None
    over_ranks = {"group": group, "exchange": exchange, "impl": "torch"}
    for step in range(STEPS):
        wire.sent, wire.listening = Counter(parameters=0, gradients=0, norm=0, loss=0), step + 1 == STEPS
        for micro_step in range(micro_steps):
            engine.backward(engine(torch.randn(SAMPLES, WIDTH), wire, over_ranks))
            held = states(engine) if micro_step + 1 == micro_steps else {}
            assert engine.step()
    wire.listening = False
    return {"wire": dict(wire.sent), "memory": held}


# Where DeepSpeed's optimizers keep them.
GRADIENTS = ("averaged_gradients", "grad_partitions_flat_buffer", "fp32_groups_gradients_flat")
MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")


def states(engine: zero.Engine) -> dict[str, int]:
    """Bytes of the storages of each kind; one that serves several kinds is counted with the first."""
    optimizer, parameters = engine.deepspeed.optimizer, list(engine.module.parameters())
    rule = getattr(optimizer, "optimizer", optimizer)
    kinds = {
        "parameters": [(p.data, getattr(p, "ds_tensor", None)) for p in parameters],
        "gradients": [p.grad for p in parameters] + [getattr(optimizer, name, None) for name in GRADIENTS],
        "optimizer": [*rule.state.items(), *(getattr(optimizer, name, None) for name in MASTERS)],
    }
    seen: set[int] = set()
    return {kind: sum(_new_storages(_tensors(held), seen)) for kind, held in kinds.items()}


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        yield from _tensors(list(held.values()))
    elif isinstance(held, Iterable):
        for each in held:
            yield from _tensors(each)


def _new_storages(tensors: Iterable[Tensor], seen: set[int]) -> Iterator[int]:
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield storage.nbytes()


def rank_of(world: int, rank: int, port: int, folder: Path) -> None:
    """A rank of one of the worlds, forked after the slow imports: it leaves its results in a file."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_PORT=str(port))

    def work() -> int:
        wire = Wire()
        results = [measured(case, wire) for case in CASES]
        (folder / f"{world} {rank}.json").write_text(json.dumps(results))
        return 0

    zero.leave(work)


def import_once() -> None:
    """What every rank would import, seconds each; and DeepSpeed collects garbage often, which need not look at all that."""
    zero.import_deepspeed(torch.device("cpu"))
    for name in ("bf16_optimizer", "zero.muon.muon_optimizer", "superoffload.superoffload_stage3"):
        importlib.import_module(f"deepspeed.runtime.{name}")
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # torch's compiler
    gc.freeze()


def main() -> int:
    """All worlds, one after another; prints the results by world, rank and case."""
    import_once()
    fork, found = torch.multiprocessing.get_context("fork"), {}
    with tempfile.TemporaryDirectory() as folder:
        for world in WORLDS:
            port = free_port()
            ranks = [fork.Process(target=rank_of, args=(world, rank, port, Path(folder))) for rank in range(world)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            assert not any(process.exitcode for process in ranks), [process.exitcode for process in ranks]
            found[world] = [json.loads((Path(folder) / f"{world} {rank}.json").read_text()) for rank in range(world)]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    zero.leave(main)
