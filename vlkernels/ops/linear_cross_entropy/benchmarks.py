"""What the linear cross-entropy is timed on, and beside whom."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlkernels.core.peers import compiled, loaded, rival
from vlkernels.core.spec import Arguments, Benchmark, Cost, InputMaker
from vlkernels.ops.linear_cross_entropy import functional, peers

BERT = {"width": 768, "entries": 30522}
HALF = (torch.bfloat16,)

BUILDS = {
    "torch": loaded(lambda: peers.dense),
    "F.linear_cross_entropy": loaded(peers.torch_chunked),
}
CARD_BUILDS = {
    **BUILDS,
    "torch.compile": compiled(BUILDS["torch"]),
    "Liger": loaded(peers.liger),
    "cut cross-entropy": loaded(peers.cut),
    "QuACK": loaded(peers.quack),
}
PEERS, CARD_PEERS = (
    {name: rival(build, functional.linear_cross_entropy) for name, build in builds.items()} for builds in (BUILDS, CARD_BUILDS)
)


def head(fill: InputMaker, rows: int, width: int, entries: int, bias: bool = True) -> Arguments:
    """The decoder of masked words, all of whose rows count."""
    with torch.no_grad():
        hidden, weight = fill.drawn(rows, width), fill.drawn(entries, width).mul_(2 / width**0.5)
    arguments = {"hidden": hidden, "weight": weight, "targets": fill.integers(0, entries, (rows,))}
    return arguments | ({"bias": fill.drawn(entries)} if bias else {})


def benchmarks() -> dict[str, Callable[[InputMaker], Arguments] | Benchmark]:
    on_card = {"devices": ("cuda",), "dtypes": HALF, "peers": CARD_PEERS}
    return {
        "quickstart_m300_v2000_d128": Benchmark(partial(head, rows=300, width=128, entries=2000), ("cpu",), peers=PEERS),
        "bert_m2048_v30522_d768": Benchmark(partial(head, rows=2048, **BERT), ("cpu",), peers=PEERS, peak_memory=True),
        "bert_m1024_v30522_d768_on_a_card": Benchmark(partial(head, rows=1024, **BERT), **on_card),
        "bert_m8192_v30522_d768": Benchmark(partial(head, rows=8192, **BERT), **on_card),
        "bert_m8192_v30522_d768_without_bias": Benchmark(partial(head, rows=8192, **BERT, bias=False), **on_card),
        "m4096_v131072_d1024_without_bias": Benchmark(
            partial(head, rows=4096, width=1024, entries=131072, bias=False), **on_card
        ),
    }


def cost(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Cost:
    product = 2 * hidden.shape[0] * weight.numel()
    moved = (hidden.numel() + weight.numel()) * hidden.element_size()
    return Cost(forward_bytes=moved, backward_bytes=2 * moved, forward_flops=product, backward_flops=2 * product)
