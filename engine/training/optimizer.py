"""The optimizer, its parameter groups and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from engine.config import Config, Optimizer, Schedule

Named = Iterable[tuple[str, nn.Parameter]]


def make_optimizer(options: Optimizer, parameters: Named, device: torch.device) -> torch.optim.Optimizer:
    """torch's AdamW or SGD over the groups of the recipe."""
    groups = parameter_groups(options, parameters)
    if options.kind == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)
    fused = device.type == "cuda"
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=fused)


def parameter_groups(options: Optimizer, parameters: Named) -> list[dict]:
    """Trainable parameters by weight decay (vectors have none) and learning rate (prefixes change it)."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    unused = set(options.lr_multipliers)
    for name, parameter in parameters:
        prefix = max((p for p in options.lr_multipliers if name.startswith(p)), key=len, default=None)
        unused.discard(prefix)
        factor = 1.0 if prefix is None else options.lr_multipliers[prefix]
        decay = options.weight_decay if parameter.dim() >= 2 else 0.0
        if parameter.requires_grad:
            groups[decay, options.lr * factor].append(parameter)
    if unused:
        prefixes = ", ".join(sorted(unused))
        raise ValueError(f"optimizer.lr_multipliers: no parameter name begins with {prefixes}")
    return [{"params": params, "weight_decay": decay, "lr": lr} for (decay, lr), params in groups.items()]


def lr_factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 0."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    done = min(1.0, (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps))
    left = 1 - done if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * left


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
