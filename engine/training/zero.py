"""DeepSpeed, and the one place where its traps on our road are met: one small function each, with the why.

A run is `join`, then an `Engine`, then `leave`. Nothing else in the project imports deepspeed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.config import Config
from engine.models.states import FollowsSteps
from engine.models.transformer import Block
from engine.training.averages import Averages
from engine.training.host_memory import keep_large_blocks
from engine.training.network import choose_interface, deadline

LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    world: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None
    """Carries host integers without touching the GPU (None: the default group does)."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_integers(self, values: list[int]) -> list[int]:
        """Sum of every position over the ranks."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def mean(self, values: Tensor) -> Tensor:
        """Mean of a device tensor over the ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world

    def gather(self, value: Any) -> list[Any]:
        """The (small, picklable) value of every rank, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.host_group)

    def main_first(self, action: Callable[[], T]) -> T:
        """`action` on rank 0, then on the others, which find its files. A failure of one is one of all."""
        for turn in (self.is_main, not self.is_main):
            error = None
            if turn:
                try:
                    result = action()
                except (ValueError, OSError) as caught:
                    error = str(caught)
            errors = [message for message in self.gather(error) if message is not None]
            if errors:
                raise ValueError(errors[0])
        return result


# ---- before anything runs


def share_cores() -> None:
    """Split the cores between the ranks of this host; DeepSpeed's launcher lets each take all."""
    if "OMP_NUM_THREADS" not in os.environ:
        local_world = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))


def pick_device(config: Config) -> torch.device:
    """The device of this rank, or one clear line why there is none."""
    kind = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        if config.precision == "fp16":
            raise ValueError("precision fp16 needs a GPU: on a cpu use bf16 or fp32")
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(f"device cuda: local rank {local_rank} has no GPU of its own, this host has {gpus}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for this device, without its builds and its chatter.

    It reads DS_ACCELERATOR while it is imported (unset, a CPU run warns once per process), so the import
    waits until the device is known. On a CPU it would compile a shared-memory collective at the first
    `init_distributed`: half a minute, a hang on a stale lock, an error without ninja, and for inference only.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*(_into_tensor|_scatter_tensor)")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def join(config: Config) -> Ranks:
    """Enter the process group: the launcher's, or a group of one.

    Without a launcher DeepSpeed asks mpi4py for one. A store in memory serves a single process instead: it
    needs no port, so any number of such runs can share a host.
    """
    keep_large_blocks()
    share_cores()
    device = pick_device(config)
    deepspeed = import_deepspeed(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK=os.environ.get("LOCAL_RANK", "0"))
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            require_launch_variables()
            choose_interface()
        with deadline(config.train.join_timeout):
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    world = dist.get_world_size()
    host_group = dist.new_group(backend="gloo") if backend == "nccl" and world > 1 else None
    return Ranks(dist.get_rank(), world, device, host_group)


def require_launch_variables() -> None:
    """One line for a launch that is not whole."""
    missing = [name for name in LAUNCH_VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} is not set")


# ---- the engine


def zero_sizes(parameters: int, trained: int) -> dict[str, int]:
    """Buffers of ZeRO in elements, in proportion to a model of so many parameters.

    DeepSpeed's defaults are for models of billions. A smaller one gets a gradient bucket of 1 GB, allocated whole, and
    under stage 3 keeps every parameter from the forward to the backward, and all its small ones always.
    """
    return {
        "reduce_bucket_size": min(max(trained // 8, 2**24), trained, 500_000_000),
        # A parameter that another module than its own reads, as heads read the word table, is empty while it is on its way.
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": min(parameters // 64, 100_000),
        "stage3_max_reuse_distance": min(parameters // 8, 1_000_000_000),
        "stage3_max_live_parameters": min(parameters // 4, 1_000_000_000),
    }


def deepspeed_config(config: Config, world: int, sizes: dict[str, int]) -> dict[str, Any]:
    """DeepSpeed's configuration: a pure function of ours and of `zero_sizes`, with every default that bites written out."""
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch(world),
        "gradient_accumulation_steps": config.micro_steps(world),
        # left out, DeepSpeed clips at 1.0; stage 0 is clipped beside its guard, see `_guard_plain_gradients`
        "gradient_clipping": config.optimizer.clip if config.zero.stage > 0 else 0.0,
        "zero_optimization": {"stage": config.zero.stage, **sizes},
        "zero_allow_untested_optimizer": True,  # SGD
        "bf16": {"enabled": config.precision == "bf16"},
        # left out, half gradients are summed over micro-steps in half precision
        "data_types": {"grad_accum_dtype": "fp32" if config.precision == "bf16" else None},
        "fp16": {"enabled": config.precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "steps_per_print": None,
    }


class Engine:
    """`module` under DeepSpeed: losses come from calling it, `backward` and `step` once per micro-step.

    The optimizer is torch's own: DeepSpeed's default for "AdamW" is an extension it compiles on the spot.
    """

    def __init__(self, config: Config, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks):
        refuse_scalar_parameters(module)
        deepspeed = import_deepspeed(ranks.device)
        self.stage, self.clip = config.zero.stage, config.optimizer.clip
        self.gradient_norm: float | None = None
        self._skeleton = empty_copy(module) if self.stage == 3 else None
        self.num_parameters = sum(parameter.numel() for parameter in module.parameters())
        trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        sizes = zero_sizes(self.num_parameters, trained)
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints tables of memory use
            self.deepspeed, *_ = deepspeed.initialize(
                model=module.to(ranks.device),
                optimizer=optimizer,
                config=deepspeed_config(config, ranks.world, sizes),
                dist_init_required=False,
            )
        self.averages = Averages(self.module, pieces_on_this_rank)
        self._followers = [part for part in self.module.modules() if isinstance(part, FollowsSteps)]

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.deepspeed(*inputs, **options)

    def compile_blocks(self) -> None:
        """Compile the transformer blocks for any number of tokens.

        The whole module would be compiled again for every size of its losses, minutes each time. A block has a
        graph of its own, for its dropout constants, and others for evaluation, for another source and for a reading
        without gradients.
        """
        blocks = [part for part in self.module.modules() if isinstance(part, Block)]
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 4 * len(blocks))
        for block in blocks:
            block.compile(dynamic=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-step; DeepSpeed divides it by the number of micro-steps."""
        self.deepspeed.backward(loss)

    def step(self) -> bool:
        """End a micro-step; after the window's last, update the weights. False: the update was skipped."""
        last = self.deepspeed.is_gradient_accumulation_boundary()
        usable = self._guard_plain_gradients() if last and self.stage == 0 else True
        self.deepspeed.step()
        if not last:
            return True
        if self.stage == 3:
            self._clear_partitioned_gradients()
        if self.stage > 0:
            self.gradient_norm = float(self.deepspeed.get_global_grad_norm())
        return self.deepspeed.was_step_applied() and usable

    def after_step(self, applied: bool) -> None:
        """Let momentum copies, queues and codebooks follow the step that the last `step` ended."""
        for part in self._followers:
            part.after_step(applied)
        if applied:
            self.averages.follow()  # buffers too: after the statistics of batch norms

    def _guard_plain_gradients(self) -> bool:
        """Give ZeRO-0 the guard that the other stages have: a gradient that is not finite changes no weight.

        The gradients are already reduced, so all ranks decide alike, and DeepSpeed has given 0 to parameters
        that no batch used; an optimizer leaves those without a gradient as they are, moments and decay too.
        """
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters]
        self.gradient_norm = norm = torch.stack(torch._foreach_norm(gradients)).norm().item()
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
        elif 0 < self.clip < norm:
            torch._foreach_mul_(gradients, self.clip / (norm + 1e-6))
        return math.isfinite(norm)

    def _clear_partitioned_gradients(self) -> None:
        """Forget this window's gradients under ZeRO-3.

        It keeps them in a flat buffer that only a new gradient overwrites: a parameter that gets none in the
        next window (alternating tasks) would be updated with the old one again.
        """
        self.deepspeed.optimizer.grad_partitions_flat_buffer.zero_()

    @contextlib.contextmanager
    def whole_module(self) -> Iterator[nn.Module]:
        """The module in evaluation mode with all its weights, for use outside the engine's forward.

        Under ZeRO-3 a parameter is empty between the passes of its module, so a copy is filled from all
        ranks: enter on every rank. The other stages hold whole weights and give the module itself.
        """
        module = self.module if self._skeleton is None else self._fill_skeleton()
        module.eval()
        try:
            yield module
        finally:
            self.module.train()
            if self._skeleton is not None:
                release(self._skeleton)

    def _fill_skeleton(self) -> nn.Module:
        """Small parameters, whole between steps, stay so: gathering cuts them up again behind itself, and the module that
        reads them next would be found to need more than in the steps that DeepSpeed has recorded."""
        import deepspeed

        assert self._skeleton is not None
        for target, source in zip(self._skeleton.parameters(), self.module.parameters(), strict=True):
            is_whole = source.ds_status == deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.AVAILABLE
            with contextlib.nullcontext() if is_whole else deepspeed.zero.GatheredParameters([source]):
                target.data = source.detach().clone()
        for target, source in zip(self._skeleton.buffers(), self.module.buffers(), strict=True):
            target.data = source.detach().clone()
        return self._skeleton

    def save(self, folder: str, tag: str) -> None:
        """Write this rank's shards; on every rank.

        DeepSpeed's own `latest` is left out: it is written while other ranks may still be writing shards. So
        is its client state, which stages 0-2 keep for rank 0 only.
        """
        self.deepspeed.save_checkpoint(folder, tag=tag, save_latest=False)

    def load(self, folder: str, tag: str) -> None:
        """Read what `save` wrote; on every rank."""
        path, _ = self.deepspeed.load_checkpoint(folder, tag=tag)
        assert path is not None, f"DeepSpeed found no checkpoint {tag} in {folder}"


def refuse_scalar_parameters(module: nn.Module) -> None:
    """Name 0-d parameters: DeepSpeed broadcasts bytes, and a 0-d tensor cannot be viewed as such."""
    scalars = [name for name, parameter in module.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ValueError(f"ZeRO cannot hold 0-d parameters, give them the shape (1,): {', '.join(scalars)}")


def pieces_on_this_rank(parameter: nn.Parameter) -> list[Tensor]:
    """What this rank holds of a parameter between two steps: under ZeRO-3 its shard and, of a small one, all of it too."""
    shard: Tensor | None = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return [parameter.data]
    whole = parameter.data if parameter.ds_persist else shard
    return [shard.data] if whole.data_ptr() == shard.data_ptr() else [shard.data, whole]


def empty_copy(module: nn.Module) -> nn.Module:
    """A copy of the module that holds no weights yet."""
    skeleton = copy.deepcopy(module)
    release(skeleton)
    return skeleton


def release(module: nn.Module) -> None:
    """Give back the memory of all weights."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


# ---- the end


def leave(main: Callable[[], int]) -> None:
    """Run `main` and end the process with its exit code, never through the interpreter's own shutdown.

    A gloo worker thread may still hold a tensor when Python finalises, and the process then aborts with code
    134 after all work is done. After an error the group stays up: peers see the closed connection at once.
    """
    code: Any = 1
    try:
        code = main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        print("interrupted; what was saved before stays", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
