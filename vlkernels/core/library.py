"""``torch.ops.vlkernels``: schemas, fakes and autograd in Python; kernels in Python or in the compiled library."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

_LIBRARY = torch.library.Library("vlkernels", "FRAGMENT")

Kernels = Mapping[str, Callable[..., Any]]
Op = torch._ops.OpOverload
Spans = tuple[int | None, ...]  # per argument the length of a list of tensors, None for anything else; no spans: no lists


class _EagerCall(threading.local):
    """Whether a kernel runs for an eager call, whose tensors are held by Python code, and not inside a compiled graph.

    Such a graph uses a buffer again for another value: the same tensor, of the same version, with other numbers. Nothing may be
    remembered for its tensors from one call to the next.
    """

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: Any) -> None:
        self.depth -= 1

    def __bool__(self) -> bool:
        return self.depth > 0


eager_call = _EagerCall()


def define(schema: str, *, fake: Callable[..., Any], kernels: Kernels | None = None) -> Op:
    """Define ``vlkernels::<schema>``.

    With ``kernels`` the last argument of the schema is ``str impl`` and chooses one of these Python functions, which
    take the other arguments. Without, the compiled library registers the kernels under the same schema.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"vlkernels::{name}", fake, lib=_LIBRARY)
    if kernels is not None:

        def run(*arguments: Any) -> Any:
            # Autocast would take products that the kernels promise in float32 in a half type.
            with torch._C._DisableAutocast():
                return kernels[arguments[-1]](*arguments[:-1])

        for dispatch_key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, run, dispatch_key)
    return getattr(torch.ops.vlkernels, name).default


def define_backward(schema: str, *, fake: Callable[..., Any], kernels: Kernels | None = None) -> Op:
    """:func:`define` for a backward op, which refuses a second derivative: silence would return wrong numbers."""
    op = define(schema, fake=fake, kernels=kernels)

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{op.name()} has no second derivative: use impl=\"reference\" for double backward")

    torch.library.register_autograd(op, refuse, lib=_LIBRARY)
    return op


def differentiable(op: Op, *, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """A callable over ``op`` with one backward for both roads.

    Eager calls go through a plain ``autograd.Function`` below the dispatcher's autograd (half the host time);
    ``torch.compile`` traces the op itself, whose autograd is registered with the same functions.
    ``backward(ctx, *grads)`` returns one gradient per argument of the op, a list for a ``Tensor[]`` argument; an op that
    returns ``Tensor[]`` gets one list of gradients.
    """
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_LIBRARY)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, spans: Spans | None, *flat: Any) -> Any:
            arguments = _nest(flat, spans)
            with torch._C._AutoDispatchBelowAutograd(), eager_call:
                output = op(*arguments)
            ctx.spans = spans
            ctx.returns_list = isinstance(output, list)
            setup_context(_NestedContext(ctx), arguments, output)
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        @refuse_twice
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            # Unpacked outside the guard: under activation checkpointing this runs the forward again, with autograd.
            context = _NestedContext(ctx, ctx.saved_tensors)
            with torch._C._AutoDispatchBelowAutograd(), eager_call:
                nested = backward(context, *((list(grads),) if ctx.returns_list else grads))
            return (None, *_flatten(nested if isinstance(nested, tuple) else (nested,), ctx.spans))

    Eager.__name__ = f"{op.name().partition('::')[2].partition('.')[0]}_eager"

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*arguments)
        if not torch.is_grad_enabled():
            with torch._C._AutoDispatchBelowAutograd(), eager_call:
                output = op(*arguments)
            return tuple(output) if isinstance(output, list) else output
        spans = tuple([len(a) if _is_tensor_list(a) else None for a in arguments])
        if not any(spans):
            return Eager.apply(None, *arguments)
        return Eager.apply(spans, *_flatten(arguments, spans))

    return call


def refuse_twice(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Gradients that raise when differentiated. PyTorch's ``once_differentiable`` lets them pass as constants
    where the cotangent is one (a gradient penalty), which is silently wrong."""

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return gradients
        refuse = torch._C._functions.DelayedError(
            'cannot differentiate twice, there is no second derivative: use impl="reference"', len(gradients)
        )
        return refuse(*[None if g is None else g.detach().requires_grad_() for g in gradients])

    return guarded


class _NestedContext:
    """An autograd context whose ``needs_input_grad`` has the shape of the op's arguments."""

    __slots__ = ("_ctx", "saved_tensors")

    def __init__(self, ctx: Any, saved_tensors: tuple[torch.Tensor | None, ...] = ()):
        object.__setattr__(self, "_ctx", ctx)
        object.__setattr__(self, "saved_tensors", saved_tensors)

    def __getattr__(self, name: str) -> Any:
        if name == "needs_input_grad":
            return _nest(self._ctx.needs_input_grad[1:], self._ctx.spans)
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)


def _is_tensor_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], torch.Tensor)


def _flatten(values: Sequence[Any], spans: Spans | None) -> Sequence[Any]:
    if spans is None:
        return values
    flat: list[Any] = []
    for value, span in zip(values, spans, strict=True):
        if span is None:
            flat.append(value)
        else:
            flat.extend([None] * span if value is None else value)
    return flat


def _nest(flat: tuple[Any, ...], spans: Spans | None) -> tuple[Any, ...]:
    if spans is None:
        return flat
    nested: list[Any] = []
    position = 0
    for span in spans:
        width = 1 if span is None else span
        nested.append(flat[position] if span is None else list(flat[position : position + width]))
        position += width
    return tuple(nested)
