"""Where the time of a step goes, and the most bytes its tensors hold, by torch.profiler."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.plain_transformer import TiedHead
from engine.models.heads import MaskedLanguageHead

DATA, LOSSES, REST, IDLE = "data", "heads and losses", "Python and autograd", "no kernel running"
OTHER = "other operators"
# Of an operator or a backward node the first pattern that fits its name, or that of an operator it runs in, counts.
PATTERNS = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        DATA: rf"^{DATA}$",
        "optimizer": r"^Optimizer\.|adamw",
        LOSSES: rf"^{LOSSES}$|cross_?entropy|nll_?loss|log_?softmax|contrastive|hard_?negatives|multinomial",
        "attention": r"attention|aten::matmul$|bmm|softmax",  # products of two activations, where they are written out
        "embeddings": r"embed",
        "norms, dropout and sums": r"layer_?norm|dropout|bernoulli|aten::add_?$|AddBackward",
        "activations": r"gelu|sigmoid|tanh",
        "linear maps": r"linear|mm$|MmBackward|conv",
    }.items()
}
HEADS = (TiedHead, MaskedLanguageHead)
ROOT = "whole step"


def take(step: Callable[[], object], module: nn.Module, device: str) -> tuple[dict[str, float], int]:
    """Shares of the step's time, which sum to 1, and the most bytes its tensors hold beside what was there before."""
    on_card = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
    if on_card:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with scopes(module), profile(activities=activities, profile_memory=not on_card, acc_events=True) as found:
        with record_function(ROOT):
            step()
            if on_card:
                torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before if on_card else peak_bytes(found)
    return shares_of(list(found.events()), device), peak


@contextlib.contextmanager
def scopes(module: nn.Module) -> Iterator[None]:
    """Names the forwards of heads, whose linear maps belong to the losses."""
    open_scopes: list[record_function] = []

    def enter(*_: object) -> None:
        open_scopes.append(record_function(LOSSES).__enter__())

    def leave(*_: object) -> None:
        open_scopes.pop().__exit__(None, None, None)

    heads = [part for part in module.modules() if isinstance(part, HEADS)]
    handles = [hook for head in heads for hook in (head.register_forward_pre_hook(enter), head.register_forward_hook(leave))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shares_of(events: list[FunctionEvent], device: str) -> dict[str, float]:
    """On a card of the time its kernels take and it waits, on a CPU of the time of operators and what is between them."""
    operators = [event for event in events if event.device_type == DeviceType.CPU]
    (root,) = (event for event in operators if event.name == ROOT)
    in_heads = {event.sequence_nr: _named(_chain(event)) == LOSSES for event in operators if _is_forward(event)}
    spent: Counter[str] = Counter({name: 0.0 for name in (*PATTERNS, OTHER)})
    for event in operators:
        chain = _chain(event)
        if device == "cuda":
            spent[_part(chain, in_heads)] += event.self_device_time_total
        elif chain[-1] is root:
            spent[_part(chain, in_heads)] += event.self_cpu_time_total
    if device == "cuda":
        spent[IDLE] = max(0.0, root.time_range.elapsed_us() - spent.total())
    return {name: own / spent.total() for name, own in spent.items()}


def _part(chain: list[FunctionEvent], in_heads: Mapping[int, bool]) -> str:
    """What an operator belongs to, by the operators around it."""
    if any(_is_backward(frame) and in_heads.get(frame.sequence_nr) for frame in chain):
        return LOSSES
    is_frame = chain[0].name == ROOT or _is_backward(chain[0])
    return _named(chain) or (REST if is_frame else OTHER)


def _named(chain: list[FunctionEvent]) -> str | None:
    """Of the outermost operator whose name we know."""
    names = (name for frame in reversed(chain) for name, known in PATTERNS.items() if known.search(frame.name))
    return next(names, None)


def _chain(event: FunctionEvent) -> list[FunctionEvent]:
    """The event and those it runs in, the outermost last."""
    found = [event]
    while found[-1].cpu_parent is not None:
        found.append(found[-1].cpu_parent)
    return found


def _is_backward(event: FunctionEvent) -> bool:
    return event.name.startswith("autograd::engine")


def _is_forward(event: FunctionEvent) -> bool:
    return event.sequence_nr >= 0 and not any(map(_is_backward, _chain(event)))


def peak_bytes(found: profile) -> int:
    held = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
