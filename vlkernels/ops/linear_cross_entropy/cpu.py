"""impl "cpp": all between the products of a chunk is compiled, csrc/linear_cross_entropy."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vlkernels.core import library
from vlkernels.core.products import multiply
from vlkernels.ops.linear_cross_entropy import driver
from vlkernels.ops.linear_cross_entropy.call import Call
from vlkernels.ops.linear_cross_entropy.driver import Rows, Sums

# Entries of the vocabulary whose derivatives are multiplied at once: the product packs them, 4 MiB of 256 rows.
SLICE_ENTRIES = 4096


def _fake(logits: Tensor, bias: Tensor | None, *rest: object) -> tuple[Tensor, Tensor]:
    entries, rows = logits.shape
    return tuple(logits.new_empty(length, dtype=torch.float32) for length in (rows, entries if rest[-1] else 0))


# Of logits [V, rows], to which the bias is still to be added: the losses [rows]. With ``gradient`` the derivatives, times the
# cotangents, take the place of the logits, and their sums over the rows are returned too: [V], else [0].
classify = library.define(
    "classify(Tensor(a!) logits, Tensor? bias, Tensor targets, Tensor? cotangents, float label_smoothing, float z_loss, "
    "bool gradient) -> (Tensor, Tensor)",
    fake=_fake,
)


class CompiledChunk:
    """Logits of a chunk with a row of the batch to a column, as the compiled passes and products read them."""

    def __init__(self, call: Call, weight: Tensor, most_rows: int):
        self._call, self._weight = call, weight
        # A half type rounds logits once, with their bias.
        self._added = None if call.bias is None or weight.dtype == torch.float32 else call.bias.to(weight.dtype)[:, None]
        self._bias = call.bias.float() if call.bias is not None and self._added is None else None
        self._memory = weight.new_empty(len(weight) * most_rows)

    def visit(self, rows: Rows, sums: Sums | None) -> Tensor:
        shape = len(self._weight), len(rows.inputs)
        logits = self._memory[: shape[0] * shape[1]].view(shape)
        if self._added is None:
            multiply(self._weight, rows.inputs.T, logits)
        else:
            torch.addmm(self._added, self._weight, rows.inputs.T, out=logits)
        options = self._call.label_smoothing, self._call.z_loss
        losses, over_rows = classify(logits, self._bias, rows.targets, rows.cotangents, *options, sums is not None)
        if sums is not None:
            sums.of_hidden[rows.span] = _toward_hidden(logits, self._weight)
            sums.add_weight(rows, logits)
            if len(sums.of_bias):
                sums.of_bias += over_rows
        return losses


def _toward_hidden(slopes: Tensor, weight: Tensor) -> Tensor:
    """``slopes^T weight``: in float32 a part of the vocabulary after the other, none of which is packed whole."""
    if weight.dtype != torch.float32:
        return slopes.T @ weight
    found = weight.new_empty(weight.shape[1], slopes.shape[1])
    for k, (entries, some) in enumerate(zip(weight.split(SLICE_ENTRIES), slopes.split(SLICE_ENTRIES))):
        multiply(entries.T, some, found, add=k > 0)
    return found.T


forward, backward = partial(driver.forward, CompiledChunk), partial(driver.backward, CompiledChunk)
