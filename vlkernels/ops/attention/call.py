"""The inputs of the raw ops, named: what every back end is called with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vlkernels.core.random import dropout_scale, dropout_threshold

SCHEMA = (
    "Tensor[] qkv, Tensor starts, Tensor lengths, Tensor? kv_starts, Tensor? kv_lengths, Tensor? kv_index, Tensor table, "
    "Tensor? bias, Tensor? distance_bias, Tensor? coordinates, Tensor? kv_coordinates, Tensor sample_ids, Tensor? rng_state, "
    "float softmax_scale, float dropout_p, SymInt stream, SymInt longest, int radius"
)


class Call(NamedTuple):
    """The arguments of ``SCHEMA``, in its order.

    ``qkv`` is ``[qkv]`` (one ``[T, 3, H, K]``) or ``[q, k, v]``. ``longest`` bounds the tokens of a sample of either stream on
    the host. A bias is ``bias``, ``[B|1, H|1, Lq, Lk]`` by position in the samples, or a sum over coordinates c of
    ``distance_bias[h, c, radius + distance]``: float32 ``[H, C, 2 radius + 1]``, where a distance is the coordinate of the key
    (int32 ``kv_coordinates [Tk, C]``, or ``coordinates`` if None) minus that of the query (``coordinates [Tq, C]``), clamped to
    the radius.
    """

    qkv: list[Tensor]
    starts: Tensor
    lengths: Tensor
    kv_starts: Tensor | None
    kv_lengths: Tensor | None
    kv_index: Tensor | None
    table: Tensor
    bias: Tensor | None
    distance_bias: Tensor | None
    coordinates: Tensor | None
    kv_coordinates: Tensor | None
    sample_ids: Tensor
    rng_state: Tensor | None
    softmax_scale: float
    dropout_p: float
    stream: int
    longest: int
    radius: int

    @property
    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each ``[T, H, K]``."""
        return split(self.qkv)

    @property
    def drawn(self) -> tuple[int, int, float]:
        """(stream, threshold, what a kept value is multiplied by)."""
        return self.stream, dropout_threshold(self.dropout_p), dropout_scale(self.dropout_p)


# Where the tensors that may want a gradient stand, in the order in which a backward returns them after those of qkv.
BIASES = tuple(Call._fields.index(name) for name in ("bias", "distance_bias"))


def split(qkv: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of ``[qkv]`` (one ``[T, 3, H, K]``) or ``[q, k, v]``."""
    return qkv[0].unbind(1) if len(qkv) == 1 else tuple(qkv)


def strides(*tensors: Tensor) -> list[int]:
    """(of a row, of a head) of every tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]
