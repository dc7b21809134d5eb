"""Other people's code beside an op: made ready before the clock starts, and not timed unless it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkernels.core.spec import Arguments, Peer

# Difference from ours as a share of our norm, for each row of an output and for each gradient as a whole: roundings pass,
# another function does not.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}


class Prepared(NamedTuple):
    """A peer's call, the tensors it is differentiated by, and those of our arguments that they stand for, in the same order."""

    call: Callable[[], Any]
    inputs: list[Tensor]
    ours: list[Tensor]


Build = Callable[..., Prepared]


def leaves(arguments: Arguments) -> list[Tensor]:
    return [t for value in arguments.values() for t in _flat(value) if t.requires_grad]


def loaded(load: Callable[[], Callable[..., Any]], change: Callable[[Arguments], Arguments] = dict) -> Build:
    """A peer whose code ``load`` imports, called with our arguments; ``change`` gives it some of its own in place of ours."""

    def build(**arguments: Any) -> Prepared:
        function, taken = load(), change(arguments)
        return Prepared(lambda: function(**taken), leaves(taken), leaves(arguments))

    return build


def compiled(build: Build, backend: str = "inductor") -> Build:
    """The same by ``torch.compile``, for these shapes alone."""

    def compile_call(**arguments: Any) -> Prepared:
        made = build(**arguments)
        torch.compiler.reset()  # past a few shapes it would fall back to the uncompiled code
        return made._replace(call=torch.compile(made.call, backend=backend, dynamic=False))

    return compile_call


def rival(build: Build, ours: Callable[..., Any]) -> Peer:
    """The peer that ``build(**arguments)`` prepares, once it equals ``ours(**arguments)``; dropout is compared at rate 0."""

    def prepare(**arguments: Any) -> tuple[Callable[[], Any], list[Tensor]]:
        steady = {**arguments, "dropout_p": 0.0} if "dropout_p" in arguments else arguments
        made = build(**steady)
        _check_equal(made, ours, steady)
        if steady is not arguments:
            made = build(**arguments)
        return made.call, made.inputs

    return Peer(prepare)


def _check_equal(made: Prepared, ours: Callable[..., Any], arguments: Arguments) -> None:
    """Raise ``ValueError`` unless every output and every gradient is ours."""
    expected, actual = _flat(ours(**arguments)), _flat(made.call())
    if len(actual) != len(expected):
        raise ValueError(f"it computes something else: {len(actual)} outputs, ours are {len(expected)}")
    for i, (theirs, own) in enumerate(zip(actual, expected)):
        _compare(f"output {i}", _rows(theirs), _rows(own))
    cotangents = [torch.randn_like(t) for t in expected]
    wanted = torch.autograd.grad(expected, made.ours, cotangents, allow_unused=True)
    lent = [t.clone() for t in cotangents]
    given = torch.autograd.grad(actual, made.inputs, lent, allow_unused=True)
    if not all(map(torch.equal, lent, cotangents)):
        raise ValueError("it writes over the gradient of its output, which every round of a benchmark reads again")
    for i, (theirs, own) in enumerate(zip(given, wanted)):
        if (theirs is None) != (own is None):
            raise ValueError(f"it computes something else: gradient {i} is {'missing' if theirs is None else 'one of its own'}")
        if own is not None:
            _compare(f"gradient {i}", theirs.reshape(1, -1), own.reshape(1, -1))


def _compare(name: str, theirs: Tensor, ours: Tensor) -> None:
    if theirs.shape != ours.shape:
        raise ValueError(f"it computes something else: its {name} is {list(theirs.shape)}, ours {list(ours.shape)}")
    if not ours.numel():
        return
    difference, size = (theirs.float() - ours.float()).norm(dim=1), ours.float().norm(dim=1)
    error = (difference / size.clamp(min=torch.finfo(torch.float32).tiny)).max().item()
    if not error <= TOLERANCE[ours.dtype]:
        raise ValueError(f"it computes something else: its {name} is off by {error:.2g} of ours")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1] if x.dim() else 1)


def _flat(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return [t for t in values if isinstance(t, Tensor)]
