"""What the README's table of measured ratios tells: one entry, one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.measured import Amounts, Figure, Row, figures, packed_step, peak_bytes, seconds

DTYPES = ("float32", "bfloat16")
PADDED = ("padded SDPA", "length-sorted SDPA")


@dataclass(frozen=True)
class Line:
    """``file`` and ``benchmark`` name the rows; the best of ``peers`` counts. ``targets``: lower bounds, by dtype.

    ``earlier``: the file of rows from before their benchmark got its name. ``heap``: of rows of this heap (`benchmarks.run`).
    """

    what: str
    against: str
    file: str
    benchmark: str
    peers: tuple[str, ...]
    targets: Mapping[str, float] = field(default_factory=dict)
    dtypes: tuple[str, ...] = DTYPES
    ours: str = "vlkernels"
    amounts: Amounts = seconds
    earlier: str | None = None
    heap: str = "kept"

    def figures(self, rows: Sequence[Row], dtype: str) -> list[Figure]:
        files = [file for file in (self.file, self.earlier) if file]
        own = [row for row in rows if row.heap == self.heap for file in files if row.is_of(file, self.benchmark, dtype)]
        return figures(own, self.amounts, self.ours, self.peers)

    def missing(self, rows: Sequence[Row]) -> list[str]:
        return [dtype for dtype in self.dtypes if not self.figures(rows, dtype)]


STEP = {
    "file": "train_step",
    "earlier": "uniter_step",
    "benchmark": "UNITER-base step",
    "ours": "packed",
    "amounts": packed_step,
    "dtypes": ("float32",),
}
ATTENTION = {"file": "attention_qkvpacked", "against": "the better of padded and length-sorted SDPA"}
DENSE = {"against": "the dense N x N loss", "peers": ("torch",), "dtypes": ("float32",)}
LARGE = DENSE | {"benchmark": "n16384_d512"}
FASTER = {"float32": 1.4}
LINES = (
    Line(
        "a whole UNITER-base step (the latest: 4 of its 12 layers), COCO-like lengths, random batches of 32",
        "the same model in plain, padded PyTorch",
        peers=("padded PyTorch, random",),
        targets={"float32": 2.0},
        **STEP,
    ),
    Line(
        "the same on UNITER's length-bucketed batches",
        "the same",
        peers=("padded PyTorch, bucketed",),
        targets={"float32": 1.08},
        **STEP,
    ),
    Line(
        "a whole LayoutLMv2-base (a quarter of its layers) step, random batches",
        "the better of plain, padded PyTorch and `transformers`",
        peers=("padded PyTorch, random", "transformers, random"),
        **STEP | {"benchmark": "LayoutLMv2-base step", "earlier": None},
    ),
    Line(
        "a whole CLIP ViT-B/32 (a quarter of its layers) step, random batches",
        "the better of plain, padded PyTorch and `transformers`",
        peers=("padded PyTorch, random", "transformers, random"),
        **STEP | {"benchmark": "CLIP ViT-B/32 step", "earlier": None},
    ),
    Line(
        "a whole ALBEF-base step (a quarter of its layers), random batches",
        "the same model in plain, padded PyTorch",
        peers=("padded PyTorch, random",),
        **STEP | {"benchmark": "ALBEF-base step", "earlier": None},
    ),
    Line(
        "a whole quickstart step: engine, ZeRO 1, data loading",
        "the same model in plain, padded PyTorch",
        "quickstart_step",
        "quickstart step",
        ("plain padded PyTorch",),
        ours="engine",
        dtypes=("float32",),
    ),
    Line(
        "attention, 32 samples of 1 to 128 tokens, half of the padded batch padding",
        "the best of padded, length-sorted and jagged SDPA",
        "attention_qkvpacked",
        "32 x 1..128, 50% padding, H12 K64",
        (*PADDED, "jagged SDPA"),
        {"float32": 2.0, "bfloat16": 2.0},
    ),
    Line("attention, 16 samples of 1 to 256 tokens", benchmark="16 x 1..256, H12 K64", peers=PADDED, **ATTENTION),
    Line("attention, 128 captions of 5 to 15 tokens", benchmark="128 x 5..15, H4 K32", peers=PADDED, **ATTENTION),
    Line(
        "LayerNorm(x + residual)",
        "PyTorch, one operator after the other",
        "layer_norm",
        "residual 8192x768",
        ("eager",),
        {"float32": 1.2, "bfloat16": 1.7},
    ),
    Line(
        "LayerNorm(residual + dropout(x + bias))",
        "PyTorch, one operator after the other",
        "layer_norm",
        "bias, dropout, residual 8192x768",
        ("eager",),
    ),
    Line("RMSNorm(x + residual)", "PyTorch, one operator after the other", "rms_norm", "residual 8192x768", ("eager",)),
    Line(
        "words and regions with their own norms and dropout",
        "PyTorch: two embedders, concatenate, gather",
        "embed_layer_norm",
        "UNITER 8192x768, dropout",
        ("eager",),
    ),
    Line(
        "pack two padded streams",
        "the best of concatenating, then `gather`, `index_select` or a boolean index",
        "pack",
        "captions and regions",
        ("cat + gather", "cat + index_select", "cat + boolean index"),
        {"float32": 2.0, "bfloat16": 2.0},
    ),
    Line(
        "patches of images of many sizes",
        "the better of reshape + permute and `unfold`, image by image",
        "patchify",
        "native sizes",
        ("reshape + permute", "unfold"),
    ),
    Line(
        "optimal transport, 256 samples of 40 words and 40 regions",
        "padded, eager PyTorch",
        "optimal_transport",
        "b256 text 40 regions 40",
        ("eager, padded",),
    ),
    Line(
        "BERT's map to q, k and v, 1,830 rows, on an AMD processor",
        "PyTorch (MKL)",
        "linear",
        "bert_t1830_768_to_2304",
        ("torch",),
        dtypes=("float32",),
    ),
    Line("contrastive loss, 8,192 pairs, width 512", file="contrastive_loss", benchmark="n8192_d512", targets=FASTER, **DENSE),
    Line("contrastive loss, 16,384 pairs, width 512", file="contrastive_loss", targets=FASTER, **LARGE),
    Line(
        "the same in a process whose heap is as glibc has it: freed memory goes back to the system",
        file="contrastive_loss",
        targets=FASTER,
        heap="default",
        **LARGE,
    ),
    Line(
        "the same: memory at its peak, times as little",
        file="contrastive_loss",
        targets={"float32": 10.0},
        amounts=peak_bytes,
        **LARGE,
    ),
    Line("sigmoid loss, 16,384 pairs, width 512", file="sigmoid_loss", targets=FASTER, **LARGE),
    Line(
        "the same in a process whose heap is as glibc has it",
        file="sigmoid_loss",
        targets=FASTER,
        heap="default",
        **LARGE,
    ),
    Line(
        "FILIP's late interaction, 256 pairs of 49 patches and up to 32 words",
        "the dense loss",
        "late_interaction_loss",
        "filip n256 p49 t5-32 d256",
        ("dense",),
        {"float32": 1.4},
    ),
    Line(
        "linear cross-entropy, 2,048 x 30,522",
        "linear, then cross-entropy in float32",
        "linear_cross_entropy",
        "bert_m2048_v30522_d768",
        ("torch",),
        {"float32": 1.0},
        dtypes=("float32",),
    ),
    Line(
        "the same: memory at its peak, times as little",
        "linear, then cross-entropy in float32",
        "linear_cross_entropy",
        "bert_m2048_v30522_d768",
        ("torch",),
        {"float32": 5.0},
        dtypes=("float32",),
        amounts=peak_bytes,
    ),
)
