"""What prepares the texts and the pictures of a folder of `transformers`: its tokenizer and its image processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers.processors import TemplateProcessing

from engine.data import ImageTransform, Tokenizer
from engine.data.tokenization.tokenizer import CLS, MASK, PAD, SEP, UNK
from engine.weights.family import Family

TOKENIZER, TOKENIZER_CONFIG, PROCESSOR = "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"
NAMES = {"pad_token": PAD, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK, "unk_token": UNK}
NAMES |= {"bos_token": CLS, "eos_token": SEP}
BICUBIC = 3
"""Of PIL's filters, by which `ImageTransform` resizes."""


class Texts(NamedTuple):
    """What a model reads as a text."""

    longest: int
    """In tokens."""
    types: int
    """Rows of the table that tells a second sentence from a first."""


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, texts: Texts, family: Family, swap: tuple[int, int] | None
) -> dict[str, Path]:
    """The tokenizer as `AutoTokenizer` reads it; drafts by the names they are to have."""
    whole = json.loads(tokenizer.model.to_str())
    if swap is not None:
        exchange(whole, *swap)
    model = tokenizers.Tokenizer.from_str(json.dumps(whole))
    if family.borders != "none":
        special = [(token, model.token_to_id(token)) for token in (CLS, SEP)]
        first = f"{CLS} $A {SEP}" if family.borders == "both" else f"$A {SEP}"
        model.post_processor = TemplateProcessing(single=first, pair=f"{first} $B:1 {SEP}:1", special_tokens=special)
    drafts = drafts_of(folder, TOKENIZER, TOKENIZER_CONFIG)
    model.save(str(drafts[TOKENIZER]))
    special_class = family.tokenizers.get(whole["model"]["type"])
    settings: dict[str, Any] = {
        **NAMES,
        "tokenizer_class": special_class or "PreTrainedTokenizerFast",
        "model_max_length": texts.longest,
        "model_input_names": [
            "input_ids",
            *(["token_type_ids"] if texts.types > 1 else []),
            *([] if family.reads_padding else ["attention_mask"]),
        ],
        **(as_bert(whole["normalizer"]) if special_class is not None else {}),
    }
    drafts[TOKENIZER_CONFIG].write_text(json.dumps(settings, indent=2) + "\n")
    return drafts


def as_bert(normalizer: dict[str, Any] | None) -> dict[str, Any]:
    """A normalizer in the words of classes that make BERT's of it."""
    if normalizer is not None and normalizer["type"] == "BertNormalizer":
        lowercase, accents = normalizer["lowercase"], normalizer["strip_accents"]
        chinese = normalizer["handle_chinese_chars"]
        return {"do_lower_case": lowercase, "strip_accents": accents, "tokenize_chinese_chars": chinese}
    steps = [step["type"] for step in (normalizer or {}).get("normalizers", [normalizer or {"type": None}])]
    return {"do_lower_case": "Lowercase" in steps, "strip_accents": False, "tokenize_chinese_chars": False}


def exchange(whole: dict[str, Any], first: int, second: int) -> None:
    """Let two pieces of a tokenizer.json change their ids."""
    other = {first: second, second: first}
    vocabulary = whole["model"]["vocab"]
    if isinstance(vocabulary, dict):
        whole["model"]["vocab"] = {piece: other.get(number, number) for piece, number in vocabulary.items()}
    else:
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        whole["model"]["unk_id"] = other.get(whole["model"]["unk_id"], whole["model"]["unk_id"])
    for token in whole["added_tokens"]:
        token["id"] = other.get(token["id"], token["id"])
    whole["added_tokens"].sort(key=lambda token: token["id"])


def write_processor(folder: Path, transform: ImageTransform, family: Family) -> dict[str, Path]:
    """How pictures are prepared, as `AutoImageProcessor` reads it; nothing where the family's class cannot do so."""
    fits = transform.resize == "fit"
    if family.processor is None or fits != family.processor.fits:
        return {}
    square = {"height": transform.size, "width": transform.size}
    crops = transform.resize == "shorter"
    settings: dict[str, Any] = {
        "image_processor_type": family.processor.name,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": BICUBIC,
        "size": {"shortest_edge": transform.size} if crops or fits else square,
        "do_center_crop": crops,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }
    settings |= {"crop_size": square} if crops else {}
    settings |= {"size_divisor": transform.patch, "do_pad": True} if fits else {}
    drafts = drafts_of(folder, PROCESSOR)
    drafts[PROCESSOR].write_text(json.dumps({**settings, **family.processor.entries}, indent=2) + "\n")
    return drafts


def drafts_of(folder: Path, *names: str) -> dict[str, Path]:
    """Files that are written whole before they get their names."""
    return {name: folder / f"{name}.draft" for name in names}
