"""``vk.RelativeBias``: an additive bias that depends on bucketed distances alone and is read from small tables."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkernels.core import checks
from vlkernels.core.layout import lasting

MOST_COORDINATES = 4
MOST_DISTANCE = 2**14
# Differences of coordinates inside these limits are exact in int32.
COORDINATE_LIMIT = 2**30


class Buckets(NamedTuple):
    """T5's buckets of a distance, key minus query: one per distance near 0, then ever wider ones up to ``max_distance``.

    ``bidirectional`` gives half of the buckets to keys behind the query; otherwise these all fall into bucket 0.
    """

    count: int
    max_distance: int
    bidirectional: bool

    @property
    def per_direction(self) -> int:
        return self.count // 2 if self.bidirectional else self.count

    def of(self, distance: Tensor) -> Tensor:
        """int64: the bucket of every distance."""
        borders = torch.tensor(_borders(self.per_direction, self.max_distance), device="cpu")
        borders = borders.to(distance.device, non_blocking=True)
        steps = distance.abs() if self.bidirectional else distance.neg().clamp(min=0)
        bucket = torch.bucketize(steps, borders, right=True)
        return bucket + (distance > 0) * self.per_direction if self.bidirectional else bucket


class RelativeBias:
    """``bias[h, i, j] = scale * sum_c tables[c][bucket_c(kv_coordinates[j, c] - coordinates[i, c]), h]``, never materialised.

    Example::

        >>> layout = vk.SegmentLayout([[3], [5]])
        >>> table = torch.randn(32, 2, requires_grad=True)           # T5's encoder: one table, shared by its layers
        >>> position = layout.token_position("sample")[:, None]
        >>> bias = vk.RelativeBias(position, [table], num_buckets=32, max_distance=128)
        >>> q, k, v = torch.randn(3, 8, 2, 16).unbind()
        >>> out = vk.attention(q, k, v, layout=layout, bias=bias)
        >>> distance = torch.arange(5) - torch.arange(5)[:, None]     # of key and query: below 8 its own bucket, 16 behind
        >>> dense = table[distance.abs() + 16 * (distance > 0)].permute(2, 0, 1)
        >>> last = [x[3:].transpose(0, 1) for x in (q, k, v)]
        >>> expected = torch.nn.functional.scaled_dot_product_attention(*last, attn_mask=dense)
        >>> torch.testing.assert_close(out[3:], expected.transpose(0, 1))

    The buckets are those of T5 (Raffel et al., 2020), rounded in float32, the same on every device. With LayoutLMv2's three
    coordinates (position, x, y) they are its spatial bias; LayoutLMv3 divides the same by ``sqrt(K)``, which is ``scale``.

    The tables are read when the object is made: make it in the forward pass, one for all layers, which then share one
    gradient. A call with tables that were written since is refused.

    Args:
        coordinates: int32 ``[T, C]``, at most four for every packed row.
        tables: C tensors ``[num_buckets_c, H]`` of any floating dtype, which get gradients.
        num_buckets, max_distance, bidirectional: one value, or one per coordinate. All distances from ``max_distance`` on
            share the last bucket; not bidirectional, all keys behind the query share the first.
        scale: multiplies the sum.
        kv_coordinates: int32 ``[Tk, C]``, for keys of another stream.

    Memory: ``distance_bias [H, C, 2 max_distance + 1]``, the bias of every distance, and its gradient; no pair of tokens.

    Errors: ``ValueError`` for shapes, dtypes, devices, coordinates or buckets that do not fit.
    """

    def __init__(
        self,
        coordinates: Tensor,
        tables: Sequence[Tensor],
        *,
        num_buckets: int | Sequence[int],
        max_distance: int | Sequence[int],
        bidirectional: bool | Sequence[bool] = True,
        scale: float = 1.0,
        kv_coordinates: Tensor | None = None,
    ):
        _check_coordinates("coordinates", coordinates, None)
        count = coordinates.shape[1]
        if kv_coordinates is not None:
            _check_coordinates("kv_coordinates", kv_coordinates, count)
        options = {"num_buckets": num_buckets, "max_distance": max_distance, "bidirectional": bidirectional}
        self.buckets = tuple(Buckets(*b) for b in zip(*(_each(name, value, count) for name, value in options.items())))
        self.tables = tuple(tables)
        _check_tables(self.tables, self.buckets)
        named = {f"tables[{c}]": table for c, table in enumerate(self.tables)}
        checks.check_same_device(coordinates=coordinates, kv_coordinates=kv_coordinates, **named)
        self.coordinates = coordinates.to(torch.int32).contiguous()
        self.kv_coordinates = None if kv_coordinates is None else kv_coordinates.to(torch.int32).contiguous()
        self.scale = scale
        self.radius = max(b.max_distance for b in self.buckets)
        self.distance_bias = self._distance_bias()
        self._versions = self._table_versions()

    def _distance_bias(self) -> Tensor:
        """``[H, C, 2 radius + 1]``, float32 at least: the bias of each distance from -radius to radius."""
        exact = functools.reduce(torch.promote_types, (t.dtype for t in self.tables), torch.float32)
        # Fake tensors, a graph's among them, are not for keeping.
        find = _kept_table_rows if type(self.coordinates) is Tensor and not torch.compiler.is_compiling() else _table_rows
        rows = find(self.buckets, self.radius, self.device)
        # The backward of an embedding adds without atomics, unlike that of an index.
        found = torch.nn.functional.embedding(rows, torch.cat([t.to(exact) for t in self.tables]))
        return (found * self.scale).permute(2, 0, 1).clone(memory_format=torch.contiguous_format)

    def is_stale(self) -> bool:
        """Whether a table has been written since it was read, as far as PyTorch counts that."""
        now = self._table_versions()
        return bool(now and self._versions) and now != self._versions

    def _table_versions(self) -> tuple[int, ...]:
        """Empty where nobody counts: in a graph, in inference mode."""
        if torch.compiler.is_compiling() or any(table.is_inference() for table in self.tables):
            return ()
        return tuple(table._version for table in self.tables)

    @property
    def device(self) -> torch.device:
        return self.coordinates.device

    @property
    def num_heads(self) -> int:
        return self.tables[0].shape[1]

    def to(self, device: torch.device | str) -> RelativeBias:
        """The same bias on another device; gradients reach the tables it was made from."""
        return self if self.device == torch.device(device) else self._with_tensors(lambda t: t.to(device))

    def _with_tensors(self, move: Callable[[Tensor], Tensor]) -> RelativeBias:
        count, distance, bidirectional = zip(*self.buckets)
        return RelativeBias(
            move(self.coordinates),
            [move(table) for table in self.tables],
            num_buckets=count,
            max_distance=distance,
            bidirectional=bidirectional,
            scale=self.scale,
            kv_coordinates=None if self.kv_coordinates is None else move(self.kv_coordinates),
        )

    def __repr__(self) -> str:
        return f"RelativeBias(heads={self.num_heads}, buckets={list(self.buckets)}, scale={self.scale})"


@torch.compiler.assume_constant_result  # a graph takes the numbers
def _borders(buckets: int, max_distance: int) -> tuple[int, ...]:
    """The smallest distance of every bucket after the first, of one direction: bucket = how many of them are reached."""
    exact = buckets // 2
    borders = list(range(1, exact + 1))
    whole = _float32(math.log(max_distance / exact))
    for distance in range(exact, max_distance + 1):
        share = _float32(_float32(math.log(_float32(distance / exact))) / whole)
        bucket = min(exact + int(_float32(share * (buckets - exact))), buckets - 1)
        borders += [distance] * (bucket - len(borders))
    return tuple(borders)


def _float32(x: float) -> float:
    """Rounded: where a border falls on a whole number, the models' float32 arithmetic decides."""
    return ctypes.c_float(x).value


def _table_rows(buckets: tuple[Buckets, ...], radius: int, device: torch.device) -> Tensor:
    """int64 ``[C, 2 radius + 1]``: where each distance reads the tables laid end to end."""
    distance = torch.arange(-radius, radius + 1, device=device)
    rows, first = [], 0
    for own in buckets:
        rows.append(own.of(distance) + first)
        first += own.count
    return torch.stack(rows)


@functools.lru_cache(maxsize=64)
def _kept_table_rows(buckets: tuple[Buckets, ...], radius: int, device: torch.device) -> Tensor:
    return lasting(lambda: _table_rows(buckets, radius, device))


def _check_coordinates(name: str, coordinates: Tensor, count: int | None) -> None:
    checks.check_integer(name, coordinates)
    checks.check_shape(name, coordinates, "[T, C]", (None, count))
    if not 1 <= coordinates.shape[1] <= MOST_COORDINATES:
        raise ValueError(f"{name} must be [T, C] with 1 <= C <= {MOST_COORDINATES}, got {list(coordinates.shape)}")
    checks.check_values_between(name, coordinates, -COORDINATE_LIMIT, COORDINATE_LIMIT)


def _each(name: str, value: Any, count: int) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one value or one per coordinate, C = {count}, got {list(value)}")
    return value


def _check_tables(tables: tuple[Tensor, ...], buckets: tuple[Buckets, ...]) -> None:
    for own in buckets:
        if not all(isinstance(number, int) for number in own):
            raise ValueError(f"num_buckets and max_distance must be whole numbers and bidirectional a bool, got {tuple(own)}")
        fewest = 4 if own.bidirectional else 2
        if own.count < fewest:
            raise ValueError(f"num_buckets must be at least {fewest} (bidirectional: {own.bidirectional}), got {own.count}")
        nearest = own.per_direction // 2 + 1
        if not nearest <= own.max_distance <= MOST_DISTANCE:
            wanted = f"[{nearest}, {MOST_DISTANCE}] for {own.count} buckets"
            raise ValueError(f"max_distance must lie in {wanted} (bidirectional: {own.bidirectional}), got {own.max_distance}")
    if len(tables) != len(buckets):
        raise ValueError(f"tables must be one per coordinate, C = {len(buckets)}, got {len(tables)}")
    for c, table in enumerate(tables):
        checks.check_floating(f"tables[{c}]", table)
    heads = tables[0].shape[1] if tables[0].dim() == 2 else None
    for c, (table, own) in enumerate(zip(tables, buckets)):
        checks.check_shape(f"tables[{c}]", table, "[num_buckets, H]", (own.count, heads))
