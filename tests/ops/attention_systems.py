"""The mask tables of the published systems and the batches they are proved on, for every implementation of attention."""

import dataclasses

import torch

import vlkernels as vk
from vlkernels.core.spec import Case
from vlkernels.ops.attention import spec
from vlkernels.testing import contract

SPEC = next(s for s in spec.SPECS if s.name == "attention")
F, C, N = "full", "causal", "none"

SELF = {  # rows see columns, within one stream
    "BERT, ViT, LayoutLM": [[F]],
    "GPT, a decoder": [[C]],
    "UNITER, ViLT, SOHO, LayoutLMv2: image, text": [[F, F], [F, F]],
    "CLIP, FILIP: both towers in one stream": [[F, N], [N, C]],
    "SigLIP, ALBEF, BLIP-2 contrastive: towers apart": [[F, N], [N, F]],
    "SimVLM, BLIP-2 captions: image, text": [[F, N], [F, C]],
    "Frozen, GIT after the prefix: causal throughout": [[C, N], [F, C]],
    "PromptFuse: prompts, image, text": [[F, F, F], [F, F, F], [F, F, F]],
    "BlindPrompt: prompts do not see text": [[F, F, N], [F, F, F], [F, F, F]],
    "prompt tuning of a decoder: prompts, image, text": [[F, N, N], [F, F, N], [F, F, C]],
    "ActionCLIP, ALPRO: four frames apart": [[F if q == k else N for k in range(4)] for q in range(4)],
    "queries, image, two texts, the second generated": [[F, F, N, N], [F, F, N, N], [F, N, F, N], [F, N, F, C]],
}
CROSS = {  # rows see columns of another stream
    "ALBEF, BLIP, ViLBERT: text to image": [[F]],
    "Q-Former: queries to image, text to nothing": [[F], [N]],
    "SimVLM, BART: decoder to image and prefix": [[F, F]],
    "a chunk of a decoder to its own cache": [[C]],
    "two questions to their own images": [[F, N], [N, F]],
}
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def lengths(name, segments):
    """int [B, segments] of a named batch."""
    position = torch.arange(segments)
    batches = {
        "primes": torch.tensor(PRIMES[: 3 * segments]).view(3, segments),
        "segments of length zero": torch.tensor([[9, 0, 4, 1], [0, 0, 0, 0], [0, 6, 0, 3], [5, 2, 0, 0]])[:, :segments],
        "one token": torch.eye(4, dtype=torch.int64)[:, :segments],
        "longer than a tile": torch.stack([130 - 60 * position.clamp(max=2), 3 + position]),
    }
    return batches[name]


BATCHES = ("primes", "segments of length zero", "one token", "longer than a tile")


def self_case(table, batch, width=16, heads=(1, 1), **options):
    def make(fill):
        layout = fill.layout(lengths(batch, len(table)))
        rows = (layout.num_tokens, heads[0]), (layout.num_tokens, heads[1]), (layout.num_tokens, heads[1])
        q, k, v = (fill.normal(*shape, width) for shape in rows)
        more = {"rng": fill.rng(), "stream": 2} if options.get("dropout_p") else {}
        return {"q": q, "k": k, "v": v, "layout": layout, "mask": vk.SegmentMask(table), "return_lse": True, **options, **more}

    return Case(batch, make)


def cross_case(table, batch):
    def make(fill):
        layout, keys = fill.layout(lengths(batch, len(table))), fill.layout(lengths(batch, len(table[0])).flip(0) + 4)
        rows = (layout.num_tokens, 1), (keys.num_tokens, 1), (keys.num_tokens, 1)
        q, k, v = (fill.normal(*shape, 16) for shape in rows)
        return {"q": q, "k": k, "v": v, "layout": layout, "kv_layout": keys, "mask": vk.SegmentMask(table), "return_lse": True}

    return Case(batch, make)


def thousand_samples(fill):
    """1,000 samples of 0 .. 4 image and 0 .. 4 text tokens."""
    layout = fill.layout(fill.integers(0, 5, (1000, 2)).cpu())
    q, k, v = (fill.normal(layout.num_tokens, 1, 16) for _ in range(3))
    return {"q": q, "k": k, "v": v, "layout": layout, "mask": vk.SegmentMask.prefix_lm(), "return_lse": True}


TABLES = [(SELF[name], self_case) for name in SELF] + [(CROSS[name], cross_case) for name in CROSS]
NAMES = [*SELF, *CROSS]
HEADS = [
    *[(width, torch.bfloat16) for width in (16, 32, 64, 80, 96, 128, 256)],
    *[(width, torch.float32) for width in (32, 64, 80)],
    *[(width, torch.float16) for width in (64, 128)],
]


def verify(case, dtype, impl):
    contract.verify(dataclasses.replace(SPEC, deterministic=False), case, dtype, impl)
