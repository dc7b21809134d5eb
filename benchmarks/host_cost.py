"""`python -m benchmarks.host_cost [--device cpu|cuda]`: host microseconds of eager calls that have next to nothing to compute.

Their rows are none (nothing is launched for them) or a handful: what is left is Python, the dispatcher and autograd. Beside ours stands
plain PyTorch's call, in turns of some forwards and then their backwards. A backward holds what `torch.autograd.grad` itself costs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import vlkernels as vk
from benchmarks.provenance import RESULTS, store
from benchmarks.timing import Parts, Timing, interleaved_parts

NATIVE = {"cpu": "cpp", "cuda": "cuda"}
WIDTH, HEADS = 64, 4
CALLS = 24  # in a row, as of a model's layers

Calls = tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]  # ours, plain PyTorch's, what both are differentiated by


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_cost", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget-s", type=float, default=1.0, help="seconds of measuring per op")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder the results are appended to")
    options = parser.parse_args(arguments)
    for make in (layer_norm, rms_norm, take_rows, pack, attention):
        ours, plain, inputs = make(options.device)
        variants = {"vlkernels": parts(ours, inputs), "plain": parts(plain, inputs)}
        timings = interleaved_parts(variants, "cpu", options.budget_s)  # the clock of the host, on a card too
        row: dict[str, object] = {"op": make.__name__}
        columns = []
        for part in ("forward", "backward"):
            row[part] = {variant: per_call(timing[part]) for variant, timing in timings.items()}
            mine, theirs = (timings[variant][part].median / CALLS * 1e6 for variant in variants)
            columns.append(f"{part} {mine:6.1f} us, plain {theirs:6.1f}, more {mine - theirs:6.1f}")
        print(f"{make.__name__:<12} {' | '.join(columns)}", flush=True)
        store("host_cost", row, options.device, options.results)
    return 0


def parts(call: Callable[[], Tensor], inputs: list[Tensor]) -> Parts:
    upstream = torch.ones_like(call())
    made: list[Tensor] = []
    return {
        "forward": lambda: made.extend([call() for _ in range(CALLS)]),
        "backward": lambda: [torch.autograd.grad(made.pop(), inputs, upstream) for _ in range(CALLS)],
    }


def per_call(timing: Timing) -> dict[str, float]:
    return {name: getattr(timing, name) / CALLS for name in ("median", "low", "high")} | {"runs": timing.runs}


def leaves(device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.ones(shape, device=device, requires_grad=True) for shape in shapes]


def layer_norm(device: str) -> Calls:
    x, residual, weight, bias = inputs = leaves(device, (0, WIDTH), (0, WIDTH), (WIDTH,), (WIDTH,))
    return (
        lambda: vk.layer_norm(x, weight, bias, residual=residual, impl=NATIVE[device]),
        lambda: F.layer_norm(residual + x, (WIDTH,), weight, bias),
        inputs,
    )


def rms_norm(device: str) -> Calls:
    x, residual, weight = inputs = leaves(device, (0, WIDTH), (0, WIDTH), (WIDTH,))
    return (
        lambda: vk.rms_norm(x, weight, residual=residual, impl=NATIVE[device]),
        lambda: F.rms_norm(residual + x, (WIDTH,), weight, 1e-6),
        inputs,
    )


def take_rows(device: str) -> Calls:
    (x,) = inputs = leaves(device, (4, WIDTH))
    positions = torch.arange(2, device=device)
    return lambda: vk.take_rows(x, positions), lambda: x[positions], inputs


def pack(device: str) -> Calls:
    images, texts = inputs = leaves(device, (1, 2, WIDTH), (1, 3, WIDTH))
    layout = vk.SegmentLayout([[2, 3]]).to(device)
    return (
        lambda: vk.pack((images, texts), layout),
        lambda: torch.cat((images, texts), 1).flatten(0, 1),
        inputs,
    )


def attention(device: str) -> Calls:
    (qkv,) = inputs = leaves(device, (4, 3, HEADS, WIDTH // HEADS))
    layout = vk.SegmentLayout([[4]]).to(device)

    def plain() -> Tensor:
        q, k, v = qkv.transpose(0, 2).unbind(1)
        return F.scaled_dot_product_attention(q, k, v).transpose(0, 1)

    return lambda: vk.attention_qkvpacked(qkv, layout=layout), plain, inputs


if __name__ == "__main__":
    sys.exit(main())
