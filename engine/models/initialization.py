"""Initial weights."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def initialize(model: nn.Module, std: float) -> None:
    """Matrices and tables normal with standard deviation `std`, biases of linear maps zero."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=std)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
