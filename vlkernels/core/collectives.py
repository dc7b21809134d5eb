"""Exchanges of rows between ranks: plain tensors, in rank order, on the caller's group; none is one process.

Ops call these in their forward only, so a backward never waits for another rank. Give the ops a group of
their own (``torch.distributed.new_group()``): their exchanges then cannot queue behind those of the
parameters.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

ProcessGroup = dist.ProcessGroup
RANK_REDUCTIONS = ("mean", "sum")
WRONG = -1  # instead of a digest of the counts: this rank holds other rows than they say


@dataclass(frozen=True)
class Rows:
    """The rows of the concatenated batch and which of them this rank holds.

    Args:
        counts: rows of every rank.
        rank: this rank within the group.
        group: the group, or ``None`` for one process.
    """

    counts: tuple[int, ...]
    rank: int = 0
    group: ProcessGroup | None = None

    @property
    def start(self) -> int:
        return self.of(range(self.rank, self.rank + 1)).start

    @property
    def stop(self) -> int:
        return self.start + self.counts[self.rank]

    def of(self, ranks: range) -> slice:
        """The rows of neighbouring ranks."""
        return slice(sum(self.counts[: ranks.start]), sum(self.counts[: ranks.stop]))

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def own(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def world_size(self) -> int:
        return len(self.counts)


_counters: list[Counter[str]] = []


@contextlib.contextmanager
def count_bytes() -> Iterator[Counter[str]]:
    """Collect what this rank sends inside the block: bytes by kind, ``gather``, ``reduce`` and ``ring``.

    Gathers and reductions are counted as ring algorithms send them: what a rank holds to W - 1 others, and a tensor
    twice without a share of one in W.
    """
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [other for other in _counters if other is not counter]


def _count(kind: str, nbytes: int) -> None:
    for counter in _counters:
        counter[kind] += nbytes


def group_name(group: ProcessGroup | None) -> str:
    """The name under which an op finds the group again; empty for one process."""
    return "" if group is None else group.group_name


def named_group(name: str) -> ProcessGroup | None:
    return _resolve_process_group(name) if name else None


def check_group(count: int, group: ProcessGroup | None, rank_counts: Sequence[int] | None) -> None:
    """Raise unless this rank is in the group and ``rank_counts`` fits the group; with others its rows are checked by all."""
    if group is not None and not isinstance(group, ProcessGroup):
        raise ValueError(
            f"group must be a torch.distributed process group that holds this rank, got {group!r}"
        )
    if rank_counts is None:
        return
    world_size = 1 if group is None else group.size()
    if len(rank_counts) != world_size:
        raise ValueError(
            f"rank_counts must hold one count for each of {world_size} ranks, got {list(rank_counts)}"
        )
    if group is None and rank_counts[0] != count:
        raise ValueError(f"rank_counts must be {count} at rank 0, the rows it has, got {list(rank_counts)}")


def check_rank_reduction(rank_reduction: str) -> None:
    if rank_reduction not in RANK_REDUCTIONS:
        raise ValueError(f'rank_reduction must be "mean" or "sum", got "{rank_reduction}"')


def locate_rows(
    own: Tensor, group: ProcessGroup | None, rank_counts: Sequence[int] | None, **options: object
) -> Rows:
    """Where the rows of ``own`` lie in the concatenated batch.

    Without ``rank_counts`` every rank must hold equally many. The first exchange shows every rank whether all counts are
    right and all ranks call with rows of one kind and the same ``options``, on which their collectives depend: if not, all
    raise an error on a CPU, and a device-side assertion fails elsewhere.
    """
    count = own.shape[0]
    if group is None:
        return Rows((count,))
    # Ranks that took each other's bytes for rows of another kind would end without a word, or with wrong numbers.
    options |= {"dtype": own.dtype, "shape of a row": list(own.shape[1:])}
    counts = (count,) * group.size() if rank_counts is None else tuple(map(int, rank_counts))
    rows = Rows(counts, group.rank(), group)
    of_counts = _digest(counts) if counts[rows.rank] == count else WRONG
    numbers = count, of_counts, _digest(options)
    mine = torch.cat([torch.full((1, 1), number, dtype=torch.int64, device=own.device) for number in numbers], dim=1)
    found = _all_gather(mine, group)
    if own.device.type != "cpu":
        torch._assert_async((found[:, 1:] == mine[:, 1:]).all())
    if of_counts == WRONG or own.device.type == "cpu":
        _refuse_what_differs(found.tolist(), rows, rank_counts, numbers[2], options)
    return rows


def _digest(value: object) -> int:
    return zlib.crc32(repr(value).encode())


def _refuse_what_differs(
    found: list[list[int]], rows: Rows, rank_counts: Sequence[int] | None, of_options: int, options: dict[str, object]
) -> None:
    held, of_counts, of_all_options = (list(column) for column in zip(*found, strict=True))
    if any(digest != _digest(rows.counts) for digest in of_counts):
        if rank_counts is None:
            raise ValueError(f"ranks hold {held} rows: pass rank_counts when they differ")
        raise ValueError(f"rank_counts must be {held} on every rank, the rows they have, got {list(rows.counts)}")
    if any(digest != of_options for digest in of_all_options):
        mine = ", ".join(f"{name} = {_shown(value)}" for name, value in options.items())
        raise ValueError(f"all ranks must call with the same options, rank {rows.rank} has {mine}")


def _shown(value: object) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else repr(value).replace("'", '"')


def gather_rows(own: Tensor, rows: Rows) -> Tensor:
    """The rows of all ranks ``[rows.total, ...]``, without gradient."""
    own = own.detach()
    if rows.group is None:
        return own
    longest = max(rows.counts)
    padded = own.new_zeros(longest, *own.shape[1:])
    padded[: own.shape[0]] = own
    gathered = _all_gather(padded, rows.group)
    if min(rows.counts) == longest:
        return gathered
    return torch.cat([part[:count] for part, count in zip(gathered.split(longest), rows.counts, strict=True)])


def _all_gather(own: Tensor, group: ProcessGroup) -> Tensor:
    gathered = own.new_empty(group.size() * own.shape[0], *own.shape[1:])
    _count("gather", (group.size() - 1) * own.nbytes)
    dist.all_gather_into_tensor(gathered, own, group=group)
    return gathered


def send_around(sent: Sequence[Tensor], received: Sequence[Tensor], rows: Rows) -> list[dist.Work]:
    """Start to send tensors to the next rank and to fill others from the one before: what to wait for before either is used.

    One batch, so that no order of sends and receives can block; tensors without elements are not sent.
    """
    after, before = (dist.get_global_rank(rows.group, (rows.rank + step) % rows.world_size) for step in (1, -1))
    sends = [dist.P2POp(dist.isend, tensor, after, rows.group) for tensor in sent if tensor.numel()]
    receives = [dist.P2POp(dist.irecv, tensor, before, rows.group) for tensor in received if tensor.numel()]
    _count("ring", sum(operation.tensor.nbytes for operation in sends))
    return dist.batch_isend_irecv(sends + receives) if sends or receives else []


def sum_over_ranks(tensor: Tensor, rows: Rows) -> Tensor:
    """The sum over ranks, in place."""
    return _all_reduce(tensor, dist.ReduceOp.SUM, rows)


def max_over_ranks(tensor: Tensor, rows: Rows) -> Tensor:
    """The maximum over ranks, in place."""
    return _all_reduce(tensor, dist.ReduceOp.MAX, rows)


def _all_reduce(tensor: Tensor, operation: Any, rows: Rows) -> Tensor:
    if rows.group is not None:
        _count("reduce", 2 * (rows.world_size - 1) * tensor.nbytes // rows.world_size)
        dist.all_reduce(tensor, operation, group=rows.group)
    return tensor


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """``tensor`` itself, with its gradient multiplied by ``factor``."""
    return tensor if factor == 1 else _ScaleGradient.apply(tensor, factor)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
