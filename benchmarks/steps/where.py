"""Where the time of a step goes, and the most bytes its tensors hold, by torch.profiler."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator

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
    DATA: r"^data$",
    "optimizer": r"^Optimizer\.|adamw",
    LOSSES: rf"^{LOSSES}$|cross_?entropy|nll_?loss|log_?softmax|contrastive|hard_?negatives|multinomial",
    "attention": r"attention",
    "embeddings": r"embed",
    "norms, dropout and sums": r"layer_?norm|dropout|bernoulli|aten::add_?$|AddBackward",
    "activations": r"gelu|sigmoid|tanh",
    "linear maps": r"aten::linear$|aten::matmul$|mm$|MmBackward|linear|conv",
}
HEADS = (TiedHead, MaskedLanguageHead)
ROOT = "whole step"


def take(step: Callable[[], object], module: nn.Module, device: str, memory: bool) -> tuple[dict[str, float], int | None]:
    """Shares of the step's time, which sum to 1, and the most bytes held beside what was there before (on a CPU)."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with scopes(module), profile(activities=activities, profile_memory=memory, acc_events=True) as found:
        with record_function(ROOT):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    shares = shares_of(list(found.events()), device)
    return shares, peak_bytes(found) if memory else None


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
    operators = [event for event in events if event.device_type == DeviceType.CPU]
    (root,) = (event for event in operators if event.name == ROOT)
    in_heads = {event.sequence_nr: _named(event) == LOSSES for event in operators if _is_forward(event)}
    seconds: Counter[str] = Counter({name: 0.0 for name in PATTERNS} | {OTHER: 0.0})
    for event in operators:
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total if _inside(event, root) else 0.0
        seconds[_part(event, in_heads)] += spent
    whole = root.time_range.elapsed_us()
    if device == "cuda":
        seconds[IDLE] = max(0.0, whole - seconds.total())
    return {name: spent / seconds.total() for name, spent in seconds.items()}


def _part(event: FunctionEvent, in_heads: dict[int, bool]) -> str:
    outermost = _chain(event)[-1] if event.cpu_parent else event
    for frame in reversed(_chain(event)):
        if frame.name.startswith("autograd::engine") and in_heads.get(frame.sequence_nr):
            return LOSSES
    named = _named(event)
    if named is not None:
        return named
    is_frame = event.name == ROOT or event is outermost or event.name.startswith("autograd::engine")
    return REST if is_frame else OTHER


def _named(event: FunctionEvent) -> str | None:
    """Of the outermost operator around it that has a name we know."""
    for frame in reversed(_chain(event)):
        for part, pattern in PATTERNS.items():
            if re.search(pattern, frame.name, re.IGNORECASE):
                return part
    return None


def _chain(event: FunctionEvent) -> list[FunctionEvent]:
    """The event and those it runs in."""
    found = [event]
    while found[-1].cpu_parent is not None:
        found.append(found[-1].cpu_parent)
    return found


def _inside(event: FunctionEvent, root: FunctionEvent) -> bool:
    return root in _chain(event)


def _is_forward(event: FunctionEvent) -> bool:
    return event.sequence_nr >= 0 and not any(frame.name.startswith("autograd::engine") for frame in _chain(event))


def peak_bytes(found: profile) -> int:
    held = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
