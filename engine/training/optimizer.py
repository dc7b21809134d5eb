"""The optimizer, its parameter groups and the learning rate as a pure function of the step."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import Config, Optimizer, Schedule
from engine.sections import require

Named = Iterable[tuple[str, nn.Parameter]]


def freeze(prefixes: list[str], parameters: Named) -> None:
    """Take the gradients of what `optimizer.freeze` names."""
    named, unused, trained = list(parameters), set(prefixes), 0
    for name, parameter in named:
        matching = {prefix for prefix in prefixes if name.startswith(prefix)}
        unused -= matching
        if matching:
            parameter.requires_grad_(False)
        trained += parameter.requires_grad
    require(not unused, f"optimizer.freeze: no parameter name begins with {', '.join(sorted(unused))}")
    require(trained > 0, f"optimizer.freeze: {', '.join(prefixes)} leave nothing to train")


def make_optimizer(options: Optimizer, parameters: Named, device: torch.device) -> torch.optim.Optimizer:
    """torch's AdamW or SGD over the groups of the recipe, or one that is both."""
    groups = parameter_groups(options, parameters)
    kinds = {group["kind"] for group in groups}
    if kinds == {"sgd"}:
        return torch.optim.SGD(groups, lr=options.lr)
    if kinds == {"adamw"}:
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=device.type == "cuda")
    return RulePerGroup(groups, {"lr": options.lr, "betas": options.betas, "eps": options.eps})


def parameter_groups(options: Optimizer, parameters: Named) -> list[dict[str, Any]]:
    """Trainable parameters by rule, weight decay (vectors have none) and learning rate."""
    groups: dict[tuple[str, float, float, float], list[nn.Parameter]] = defaultdict(list)
    unused = {"rules": set(options.rules), "lr_multipliers": set(options.lr_multipliers)}
    for name, parameter in parameters:
        ruled, multiplied = longest_prefix(name, options.rules), longest_prefix(name, options.lr_multipliers)
        unused["rules"].discard(ruled)
        unused["lr_multipliers"].discard(multiplied)
        if parameter.requires_grad:
            kind, lr, decay, momentum = effective_rule(options, ruled)
            factor = options.lr_multipliers.get(multiplied, 1.0)
            groups[kind, decay if parameter.dim() >= 2 else 0.0, lr * factor, momentum].append(parameter)
    for option, prefixes in unused.items():
        named = ", ".join(sorted(prefixes))
        require(not prefixes, f"optimizer.{option}: no parameter name begins with {named}")
    return [
        {"params": params, "kind": kind, "weight_decay": decay, "lr": lr, **({"momentum": momentum} if kind == "sgd" else {})}
        for (kind, decay, lr, momentum), params in groups.items()
    ]


def longest_prefix(name: str, prefixes: Iterable[str]) -> str:
    """The longest of those that the name begins with; none is the empty one."""
    return max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default="")


def effective_rule(options: Optimizer, prefix: str) -> tuple[str, float, float, float]:
    """Kind, learning rate, decay and momentum of the parameters of a rule; the empty prefix is the recipe's own."""
    own, names = options.rules.get(prefix), ("kind", "lr", "weight_decay", "momentum")
    given = {name: getattr(own, name, None) for name in names}
    return tuple(getattr(options, name) if given[name] is None else given[name] for name in names)


class RulePerGroup(torch.optim.Optimizer):
    """AdamW or SGD, as each group's `kind` says: SOHO's transformer and its CNN in one optimizer, which is all that ZeRO
    takes. Both are elementwise, and torch's own; each updates the groups it has, with the states kept here."""

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]):
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        assert closure is None, "nobody evaluates the loss again"
        for group in self.param_groups:
            rule = torch.optim.SGD if group["kind"] == "sgd" else torch.optim.AdamW
            updater = rule([{"params": group["params"]}])
            updater.param_groups[0].update(group)
            updater.state = self.state
            updater.step()


def lr_factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 0."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind in ("cosine", "linear"):
        done = min(1.0, (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps))
        left = 1 - done if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * left
    return max(schedule.min_lr_ratio, decay(schedule, step, total_steps))


def decay(schedule: Schedule, step: int, total_steps: int) -> float:
    """What is left by the schedules that do not end at a given value."""
    if schedule.kind == "step":
        passed = bisect.bisect_right([round(share * total_steps) for share in schedule.decay_at], step)
        return schedule.factor**passed
    if schedule.kind == "epoch":
        return schedule.factor ** (step * schedule.epochs // total_steps)
    if schedule.kind == "rsqrt":
        return math.sqrt(schedule.flat_steps / max(step, schedule.flat_steps))
    return 1.0


class LearningRate:
    """Sets the rate of every group before a step. It has no state, so there is nothing to save or restore."""

    def __init__(self, config: Config, optimizer: torch.optim.Optimizer):
        self.schedule, self.total_steps = config.schedule, config.train.total_steps
        self.optimizer, self.peak = optimizer, config.optimizer.lr
        self.group_peaks = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int) -> float:
        """The learning rate (of groups without a multiplier) that step `step` now uses."""
        factor = lr_factor(self.schedule, step, self.total_steps)
        for group, peak in zip(self.optimizer.param_groups, self.group_peaks, strict=True):
            group["lr"] = peak * factor
        return self.peak * factor
