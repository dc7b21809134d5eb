"""Shapes that every implementation of the norms is tried on, on a CPU and in the emulator."""

import torch

from vlkernels.core.spec import Case
from vlkernels.ops.layer_norm.spec import without_bias

WIDTHS = (1, 7, 64, 768, 770, 1024, 4096, 16384)
ROWS = (0, 1, 2, 31, 1087)


def of(spec, case):
    """A case of layer_norm for either op."""
    return case if spec.name == "layer_norm" else without_bias(case)


def fused_norm(rows, width, weight_dtype=torch.float32):
    """Everything that can be fused, on so many rows."""

    def make(fill):
        return {
            "x": fill.normal(rows, width),
            "weight": fill.normal(width, dtype=weight_dtype),
            "bias": fill.normal(width),
            "residual": fill.normal(rows, width),
            "linear_bias": fill.normal(width, dtype=weight_dtype),
            "dropout_p": 0.1,
            "row_scale": fill.normal(rows, grad=False, dtype=torch.float32),
            "rng": fill.rng(),
            "stream": 2,
            "eps": 0.1 if width == 1 else 1e-5,  # the RMSNorm of one column is its sign, which leaps at 0
            "return_sum": True,
        }

    return Case(f"{rows} rows of {width}", make)


def normed_embedding(rows, width, weight_dtype=torch.float32, sizes=(9, 4), num_norms=2):
    """Tables, a dense term, several norms and dropout, on so many rows."""

    def make(fill):
        return {
            "ids": torch.stack([fill.integers(-1, size, (rows,)) for size in sizes], dim=1),
            "tables": [fill.normal(size, width) for size in sizes],
            "weight": fill.normal(num_norms, width, dtype=weight_dtype),
            "bias": fill.normal(num_norms, width),
            "dense": fill.normal(rows, width),
            "norm_ids": fill.integers(-1, num_norms, (rows,)),
            "dropout_p": 0.1,
            "rng": fill.rng(),
            "stream": 2,
            "eps": 1e-5,
        }

    return Case(f"{rows} rows of {width}", make)
