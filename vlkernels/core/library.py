"""``torch.ops.vlkernels``: schemas, fakes and autograd in Python; kernels in Python or in the compiled library."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("vlkernels", "FRAGMENT")

Kernels = Mapping[str, Callable[..., Any]]
Op = torch._ops.OpOverload
Spans = tuple[int | None, ...]  # per argument the length of a list of tensors, None for anything else


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


def differentiable(
    op: Op, *, setup_context: Callable[..., None], backward: Callable[..., Any], returned: int | None = None
) -> Callable[..., Any]:
    """A callable over ``op`` with one backward for both roads.

    Eager calls go through a plain ``autograd.Function`` below the dispatcher's autograd (half the host time);
    ``torch.compile`` traces the op itself, whose autograd is registered with the same functions.
    ``backward(ctx, *grads)`` returns one gradient per argument of the op, a list for a ``Tensor[]`` argument; an op that
    returns ``Tensor[]`` gets one list of gradients. Of an op with several outputs an eager call returns the first
    ``returned`` ones, if it says so; the others are there for the backward, which gets no gradients for them.
    """
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_LIBRARY)
    lists = frozenset(i for i, argument in enumerate(op._schema.arguments) if str(argument.type) == "List[Tensor]")
    returns_list = [str(output.type) for output in op._schema.returns] == ["List[Tensor]"]

    def run(arguments: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd(), eager_call:
            return op(*arguments)

    def outputs(output: Any) -> Any:
        return tuple(output) if returns_list else output if returned is None else output[:returned]

    @refuse_twice
    def differentiate(context: Any, *grads: Any) -> tuple[Any, ...]:
        with torch._C._AutoDispatchBelowAutograd(), eager_call:
            nested = backward(context, *((list(grads),) if returns_list else grads))
        gradients = nested if isinstance(nested, tuple) else (nested,)
        return (None, *(gradients if context.spans is None else _flatten(gradients, context.spans)))

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, spans: Spans | None, *flat: Any) -> Any:
            arguments = flat if spans is None else _nest(flat, spans)
            output = run(arguments)
            ctx.spans = spans
            setup_context(ctx, arguments, output)
            return outputs(output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return differentiate(_BackwardContext(ctx), *grads)

    # Its node in a graph is of a class that was made with this one: profilers and errors show that one's name.
    Eager.__name__ = op.name().partition("::")[2].partition(".")[0]
    Eager._backward_cls.__name__ = f"{Eager.__name__}_backward"

    # Function.apply walks through all arguments, for functorch, before it calls this: 3 us of a layer's call.
    bare_apply = super(torch.autograd.Function, Eager).apply

    def apply(*arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(f'{op.name()} has no rule for transforms of torch.func: use impl="reference" under them')
        return bare_apply(*arguments)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*arguments)
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, arguments)
        if not torch.is_grad_enabled():
            return outputs(run(arguments))
        if not lists:
            return apply(None, *arguments)
        spans = tuple([len(a) if i in lists else None for i, a in enumerate(arguments)])
        return apply(spans, *_flatten(arguments, spans))

    return call


def refuse_twice(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Gradients that raise when differentiated. PyTorch's ``once_differentiable`` lets them pass as constants
    where the cotangent is one (a gradient penalty), which is silently wrong. What they are functions of comes with them:
    without a way there, a product with a Hessian would be 0."""

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        kept = [t for t in ctx.saved_tensors if t is not None and t.requires_grad]
        sources = [*(kept or _leaves(ctx)), *(g for g in grads if g is not None and g.requires_grad)]
        constants = [None if g is None else g.detach().requires_grad_() for g in gradients]
        refuse = torch._C._functions.DelayedError(
            'cannot differentiate twice, there is no second derivative: use impl="reference"', len(constants) + len(sources)
        )
        return refuse(*constants, *sources)[: len(constants)]

    return guarded


def _leaves(node: Any) -> list[torch.Tensor]:
    """What the graph behind a node begins with: ops that keep only finished gradients keep no way to their inputs."""
    seen, left, leaves = set(), [node], []
    while left:
        for behind, _ in left.pop().next_functions:
            if behind is not None and behind not in seen:
                seen.add(behind)
                left.append(behind)
                leaves += [behind.variable] if hasattr(behind, "variable") else []
    return leaves


def _refuse_tangents(op: Op, arguments: Sequence[Any]) -> None:
    """Below the dispatcher's autograd tangents would be dropped without a word."""
    for value in torch.utils._pytree.tree_leaves(arguments):
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(f'{op.name()} has no forward-mode derivative: use impl="reference" for jvp')


class _BackwardContext:
    """What a backward asks its autograd context for: ``needs_input_grad`` in the shape of the op's arguments, tensors unpacked.

    They are unpacked here, above the dispatcher's autograd: under activation checkpointing this runs the forward again.
    """

    __slots__ = ("_ctx", "needs_input_grad", "saved_tensors")

    def __init__(self, ctx: Any):
        needed = ctx.needs_input_grad[1:]
        self._ctx = ctx
        self.needs_input_grad = needed if ctx.spans is None else _nest(needed, ctx.spans)
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _flatten(values: Sequence[Any], spans: Spans) -> list[Any]:
    flat: list[Any] = []
    for value, span in zip(values, spans, strict=True):
        if span is None:
            flat.append(value)
        else:
            flat.extend([None] * span if value is None else value)
    return flat


def _nest(flat: tuple[Any, ...], spans: Spans) -> tuple[Any, ...]:
    nested: list[Any] = []
    position = 0
    for span in spans:
        width = 1 if span is None else span
        nested.append(flat[position] if span is None else list(flat[position : position + width]))
        position += width
    return tuple(nested)
