"""impl "triton" on the host: the rows that count, and the launches of both passes. Triton is imported by the first call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkernels.core import similarity, triton_runtime
from vlkernels.core.similarity import DTYPES, FACTOR, TileSizes, Wave, rows_of
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.linear_cross_entropy.call import Call, saved_dtype
from vlkernels.ops.linear_cross_entropy.gpu.tile_sizes import tile_sizes

# Splits of the vocabulary keep a large card busy with few rows; with many rows there are fewer.
MOST_SPLITS, BUSY_PROGRAMS = 16, 1024
LOSS_ROWS, LOSS_WARPS = 128, 4

Gradients = tuple[Tensor, Tensor, Tensor]


def refusal(facts: Mapping[str, Any]) -> str | None:
    """Why these kernels cannot serve a call; ``None`` when they can."""
    for whose, dtype in (("inputs are", facts["dtype"]), ("teacher is", facts["teacher_dtype"])):
        if dtype is not None and dtype not in DTYPES:
            return f"it computes in float32, the {whose} {str(dtype).removeprefix('torch.')}"
    return None


def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``torch_kernels.forward``; no tensor depends on how many rows count, and nothing waits for that number."""
    call, (reduction, gradient) = Call(*inputs[:-2]), inputs[-2:]
    live = LiveRows.of(call)
    with torch.cuda.device_of(call.hidden):
        losses, ends = _losses(call, live)
        gradients = _gradients(call, live, ends, None) if gradient else [losses.new_empty(0) for _ in range(3)]
    factor = losses.new_ones(())
    if reduction == "mean":
        factor = live.count.to(losses.dtype).clamp_min(1).reciprocal()
    loss = live.put(losses) if reduction == "none" else losses.sum() * factor
    return loss, *gradients, factor


def backward(grad: Tensor, *inputs: Any) -> Gradients:
    """Gradients for one cotangent per row; the statistics are computed once more."""
    call = Call(*inputs)
    live = LiveRows.of(call)
    # float16 has no room for any cotangent: the largest one is put back at the end.
    size = grad.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny) if len(grad) else grad.new_ones(())
    with torch.cuda.device_of(call.hidden):
        _, ends = _losses(call, live)
        gradients = _gradients(call, live, ends, live.take(grad.float() / size))
    return tuple(gradient.mul_(size) for gradient in gradients)


class LiveRows(NamedTuple):
    """The rows whose target counts before all others, in an order that the device finds for itself.

    ``count`` of them, int32; the others' hidden rows are 0, whatever they hold.
    """

    order: Tensor
    count: Tensor
    targets: Tensor
    hidden: Tensor
    teacher_hidden: Tensor | None

    @classmethod
    def of(cls, call: Call) -> LiveRows:
        live = call.targets != call.ignore_index
        order = live.to(torch.uint8).argsort(descending=True, stable=True)
        alive = live[order]
        targets = torch.where(alive, call.targets[order], 0).to(torch.int32)
        hidden, teacher_hidden = (
            None if rows is None else torch.where(alive[:, None], rows[order], 0) for rows in (call.hidden, call.teacher_hidden)
        )
        return cls(order, live.sum(dtype=torch.int32), targets, hidden, teacher_hidden)

    def take(self, rows: Tensor) -> Tensor:
        return rows[self.order]

    def put(self, taken: Tensor) -> Tensor:
        return torch.empty_like(taken).index_copy_(0, self.order, taken)


def _losses(call: Call, live: LiveRows) -> tuple[Tensor, Tensor]:
    """Losses of the rows in their order, 0 for those that do not count, and what their slopes are made from."""
    rows, architecture = len(live.order), triton_runtime.architecture(call.hidden.device)
    losses = torch.empty(rows, dtype=torch.float32, device=call.hidden.device)
    statistics, ends = new_statistics(call, live, architecture)
    if rows:
        statistics_launch(call, live, statistics, architecture).run()
        losses_launch(call, live, statistics, losses, ends).run()
    return losses, ends


def _gradients(call: Call, live: LiveRows, ends: Tensor, cotangents: Tensor | None) -> list[Tensor]:
    """Gradients of the sum of the losses, times ``cotangents`` of the rows in their order."""
    architecture, weight = triton_runtime.architecture(call.hidden.device), rows_of(call.weight)
    toward_hidden, toward_weight = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (live.hidden, weight))
    toward_bias = toward_hidden.new_zeros(0 if call.bias is None else len(weight))
    height = similarity.wave_shape(len(live.hidden), len(weight), weight.element_size())[0] if len(live.hidden) else 0
    bias_sums = None if call.bias is None else new_bias_sums(call, height, architecture)

    def weigh(wave: Wave) -> None:
        launch = slopes_launch(call, live, ends, cotangents, wave, bias_sums, architecture)
        launch.run()
        if bias_sums is not None:
            tiles = -(-wave.weights.shape[0] // launch.constants["ROWS"])
            toward_bias[wave.columns] += bias_sums[:tiles, wave.columns].sum(0)

    similarity.differentiate(weigh, live.hidden, weight, toward_hidden, toward_weight)
    of_hidden = live.put(toward_hidden.to(saved_dtype(call.hidden)))
    return [of_hidden, toward_weight.to(saved_dtype(weight)), toward_bias]


def new_statistics(call: Call, live: LiveRows, architecture: int) -> tuple[Tensor, Tensor]:
    """Memory for what splits know of rows, and for what is known in the end."""
    taught, splits = call.teacher_hidden is not None, _splits(call, _sizes(call, architecture))[0]
    fields, ends = (8, 5) if taught else (4, 2)
    empty = torch.empty(fields * splits + ends, len(live.order), dtype=torch.float32, device=call.hidden.device)
    return empty[: fields * splits].unflatten(0, (fields, splits)), empty[fields * splits :]


def new_bias_sums(call: Call, height: int, architecture: int) -> Tensor:
    """Memory for sums over the rows of each tile of a wave that is so high."""
    tiles = -(-height // _sizes(call, architecture).rows)
    return torch.empty(tiles, len(call.weight), dtype=torch.float32, device=call.hidden.device)


def statistics_launch(call: Call, live: LiveRows, statistics: Tensor, architecture: int) -> Launch:
    sizes = _sizes(call, architecture)
    splits, split_entries = _splits(call, sizes)
    arguments = (
        *_products(call, live), live.count, statistics, *_strides(call, live), len(live.order), len(call.weight), split_entries,
        call.temperature,
    )  # fmt: skip
    grid = (-(-len(live.order) // sizes.rows), splits)
    constants = {**_constants(call, sizes, architecture), "SMOOTHED": call.label_smoothing > 0}
    return Launch(_kernels().statistics_kernel, grid, arguments, constants, sizes.warps, sizes.stages)


def losses_launch(call: Call, live: LiveRows, statistics: Tensor, losses: Tensor, ends: Tensor) -> Launch:
    rows = len(live.order)
    arguments = statistics, live.count, losses, ends, rows, len(call.weight), statistics.shape[1], *_options(call)
    constants = {"ROWS": LOSS_ROWS, "TAUGHT": call.teacher_hidden is not None}
    return Launch(_kernels().losses_kernel, (-(-rows // LOSS_ROWS),), arguments, constants, LOSS_WARPS, 1)


def slopes_launch(
    call: Call, live: LiveRows, ends: Tensor, cotangents: Tensor | None, wave: Wave, bias_sums: Tensor | None, architecture: int
) -> Launch:  # fmt: skip
    sizes = _sizes(call, architecture)
    arguments = (
        *_products(call, live), live.count, ends, cotangents, wave.weights, bias_sums, *_strides(call, live),
        wave.weights.stride(0), len(live.order), len(call.weight), *_options(call),
        wave.rows.start, wave.columns.start, wave.rows.stop, wave.columns.stop,
    )  # fmt: skip
    constants = {**_constants(call, sizes, architecture), "FACTOR": FACTOR[call.hidden.dtype]}
    return Launch(_kernels().slopes_kernel, (wave.programs(sizes),), arguments, constants, sizes.warps, sizes.stages)


def _sizes(call: Call, architecture: int) -> TileSizes:
    return tile_sizes(call.hidden.dtype, call.hidden.shape[1], call.teacher_hidden is not None, architecture)


def _splits(call: Call, sizes: TileSizes) -> tuple[int, int]:
    """Splits of the vocabulary, and how many entries each has: whole tiles."""
    tiles = -(-len(call.weight) // sizes.columns)
    wanted = min(MOST_SPLITS, max(1, BUSY_PROGRAMS // max(1, -(-len(call.hidden) // sizes.rows))))
    tiles_each = -(-tiles // wanted)
    return -(-tiles // tiles_each), tiles_each * sizes.columns


def _products(call: Call, live: LiveRows) -> tuple[Tensor | None, ...]:
    teacher_weight = None if call.teacher_weight is None else rows_of(call.teacher_weight)
    biases = (None if bias is None else bias.contiguous() for bias in (call.bias, call.teacher_bias))
    bias, teacher_bias = biases
    return live.hidden, rows_of(call.weight), bias, live.targets, live.teacher_hidden, teacher_weight, teacher_bias


def _strides(call: Call, live: LiveRows) -> tuple[int, ...]:
    hidden, weight, _, _, *teacher, _ = _products(call, live)
    return tuple(0 if x is None else x.stride(0) for x in (hidden, weight, *teacher))


def _constants(call: Call, sizes: TileSizes, architecture: int) -> dict[str, Any]:
    constants = {"ROWS": sizes.rows, "COLUMNS": sizes.columns, "DEPTH": sizes.depth, "WIDTH": call.hidden.shape[1]}
    if call.teacher_hidden is None:
        return {**constants, "TEACHER_DEPTH": 0, "TEACHER_WIDTH": 0}
    width = call.teacher_hidden.shape[1]
    depth = tile_sizes(call.teacher_hidden.dtype, width, True, architecture).depth
    return {**constants, "TEACHER_DEPTH": depth, "TEACHER_WIDTH": width}


def _options(call: Call) -> tuple[float, float, float, float]:
    return call.label_smoothing, call.z_loss, call.distillation, call.temperature


def _kernels() -> Any:
    from vlkernels.ops.linear_cross_entropy.gpu import kernels

    return kernels
