"""Every objective from records to figures: what it prepares, its loss, the gradients of its head, what it measures."""

import math

import pytest
import torch
from shared_cache import shared_cache

from engine.build import build_model
from engine.config import Config
from engine.data import (
    held_out_batches,
    load_source,
    load_training_sets,
    make_tokenizer,
    training_stream,
)
from engine.data.builtin import folder_sets
from engine.evaluation import describe, evaluate
from engine.objectives import Objectives, PretrainingModule, find
from engine.sections import (
    Data,
    DecoderStack,
    GeneratorStack,
    ImageInput,
    ImageStack,
    JointStack,
    Model,
    TextStack,
    Tokenizer,
    Train,
)

__all__ = ["shared_cache"]

SIZES = {"width": 32, "layers": 2, "heads": 2, "mlp_width": 64}
ROLES = {"image": None, "text": None, "fusion": None}
READER = TextStack(**SIZES, pooling="pooler")
GENERATOR = GeneratorStack(**SIZES | {"layers": 1})
CAUSAL = TextStack(**SIZES, mask="causal")
IMAGE = ImageStack(**SIZES)
TOWERS = {"image": IMAGE, "text": TextStack(**SIZES)}
QUERIES = JointStack(**SIZES, norm="post", queries=3, source="image", cross_every=2, own_feed_forward=True, pooling="first")
WRITER = DecoderStack(**SIZES, source="text", shares="words")
TEXT = {"source": "builtin-text", "held_out": "builtin-text", "max_caption_tokens": 24}
PAGES = JointStack(**SIZES, page="concat", image=ImageInput(kind="grid", backbone="resnet18_fpn", positions="text"))
CODED = ImageInput(kind="grid", backbone="resnet18", max_grid=(2, 2), positions="sinusoidal", codes=16)
PAGE_DATA = {"source": "builtin-pages", "held_out": "builtin-pages", "image_size": 32}
CASES = {
    "next_sentence": ({"text": READER}, {**TEXT, "documents": "next_sentence"}, {}),
    "sentence_order": ({"text": READER}, {**TEXT, "documents": "sentence_order"}, {}),
    "span_boundary": ({"text": READER}, TEXT, {}),
    "masked_language": ({"text": READER}, TEXT, {}),
    "distillation": ({"text": READER}, TEXT, {}),
    "replaced_tokens": ({"text": READER, "generator": GENERATOR}, TEXT, {}),
    "causal_language": ({"text": CAUSAL}, {**TEXT, "documents": "blocks"}, {"label_smoothing": 0.1}),
    "causal_language of images": (
        {"image": IMAGE, "decoder": DecoderStack(**SIZES, source="image")}, {}, {"output": "transform"},
    ),
    "denoising": ({"text": READER, "decoder": WRITER}, TEXT, {"output": "scaled"}),
    "denoising of words": ({"text": READER, "decoder": WRITER}, TEXT, {"noise": "infilling", "probability": 0.3}),
    "denoising behind a prefix": ({"text": READER, "decoder": WRITER}, TEXT, {"noise": "prefix"}),
    "classification": ({"image": IMAGE}, {"source": "builtin-glyph-classes", "held_out": "builtin-glyph-classes"}, {"classes": 40}),
    "document_classes": ({"text": READER}, PAGE_DATA, {"classes": 40}),
    "covered_lines": ({"joint": PAGES}, PAGE_DATA, {}),
    "page_matching": ({"joint": PAGES}, PAGE_DATA, {}),
    "masked_visual_codes": ({"joint": JointStack(**SIZES, image=CODED)}, {}, {"scale": 5.0}),
    "sigmoid_contrastive": (TOWERS, {}, {}),
    "late_interaction": (TOWERS, {}, {}),
    "query_contrastive": ({"image": IMAGE, "joint": QUERIES}, {}, {"label_smoothing": 0.1}),
    "causal_language behind queries": ({"image": IMAGE, "joint": QUERIES}, {}, {"opening": "sentinel"}),
    "triplet": (TOWERS, {}, {}),
    "flat_sequence": (
        {"joint": JointStack(**SIZES, mask="causal", max_positions=80, image=ImageInput())},
        {"source": "builtin-scenes", "held_out": "builtin-scenes"}, {"bins": 16, "objects": 4},
    ),
    "detection": (
        {"image": IMAGE, "decoder": DecoderStack(**SIZES, source="image")},
        {"source": "builtin-scenes", "held_out": "builtin-scenes"}, {"queries": 6, "classes": 64, "attributes": 8},
    ),
}  # fmt: skip


def config_of(case: str, cache: str) -> Config:
    name = case.split(" ")[0]
    roles, data, options = CASES[case]
    return Config(
        data=Data(**{"max_records": 40, "cache": cache, **data}),
        tokenizer=Tokenizer(vocab_size=400, sentinels=20),
        model=Model(**{**ROLES, **roles}),
        objectives=Objectives(**{name: find()[name](**options)}),
        train=Train(global_batch=12, max_steps=1),
    )


@pytest.mark.parametrize("case", list(CASES))
def test_from_records_to_figures(case, shared_cache, tmp_path, monkeypatch):
    for split in ("train", "held_out"):
        monkeypatch.setitem(folder_sets.NUM_PAGES, split, 24)
    config = config_of(case, str(tmp_path if CASES[case][1] is PAGE_DATA else shared_cache))
    ((name, objective),) = config.objectives.active.items()
    sets = load_training_sets(config)
    tokenizer = make_tokenizer(config, sets)
    (batch,) = next(training_stream(config, sets, tokenizer, 0, 1, step=0, samples_seen=0))
    torch.manual_seed(0)
    model = build_model(config, tokenizer.vocab_size)
    total, losses, report = PretrainingModule(model, config.objectives.active)(batch)
    assert total.isfinite() and all(value.dim() == 0 and not value.requires_grad for value in report.values())
    torch.testing.assert_close(total, sum(losses.values()))
    total.backward()
    for parameter_name, parameter in model.heads.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.any()), parameter_name
    assert set(model.heads) <= {name}

    source = load_source(config.data, "held_out")
    results = evaluate(model, lambda size, task: list(held_out_batches(config, source, tokenizer, size, task))[:2], config)
    assert describe(results).count("(") >= 2
    assert all(math.isfinite(value) for value in results[name].values()), results


def test_every_objective_is_looked_at():
    by_recipes = {"contrastive", "matching", "masked_region_features", "masked_region_classes", "random_matching"}
    by_recipes |= {"query_matching", "momentum_contrastive", "masked_patches"}
    assert {case.split(" ")[0] for case in CASES} | by_recipes == set(find())
