"""One error rule for every op, dtype and implementation.

``err(kernel) <= 2 * err(eager PyTorch in the same dtype) + 4 ulps``, in the max norm against the float64 reference; an ulp is
the spacing of the dtype at the largest true value. It has no per-op tolerances, so there is nothing to loosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
ULPS = 4.0


def max_error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference over the finite entries; infinite when non-finite entries do not agree."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    finite = truth.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return float("inf")
    if not torch.equal(actual[~finite].nan_to_num(), truth[~finite].nan_to_num()):
        return float("inf")
    return (actual - truth)[finite].abs().max().item() if finite.any() else 0.0


def bound(eager: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """The largest error the rule allows for a result of ``dtype``."""
    finite = truth.detach().double().cpu()
    finite = finite[finite.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    return FACTOR * max_error(eager, truth) + ULPS * torch.finfo(dtype).eps * scale


def assert_close(name: str, actual: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Raise ``AssertionError`` with both errors unless ``actual`` obeys the rule."""
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, the reference has {list(truth.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, the reference in the same dtype gives {eager.dtype}"
    assert max_error(eager, truth) < float("inf"), f"{name}: eager PyTorch is not finite where float64 is: the case proves nothing"
    error, allowed = max_error(actual, truth), bound(eager, truth, actual.dtype)
    assert error <= allowed, (
        f"{name}: error {error:.3e} against float64, allowed {allowed:.3e} "
        f"(eager PyTorch in {actual.dtype}: {max_error(eager, truth):.3e})"
    )
