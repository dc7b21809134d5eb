"""Every norm of a model of transformers swapped: the same outputs, state dict and training, and a report of what was left."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import vlkernels as vk
from tests.integrations.comparing import cast, floats
from tests.integrations.test_curves import STEPS, bert, masked_words, words
from tests.integrations.tiny_models import CASES, IMAGE, VOCABULARY, T, redrawn
from vlkernels.core import native
from vlkernels.integrations.swap import unswap
from vlkernels.ops.layer_norm import functional
from vlkernels.testing.error_rule import assert_close

needs_kernel = pytest.mark.skipif(native.missing("layer_norm_forward", "CPU") is not None, reason="no compiled library")
swap_norms = vk.integrations.transformers.swap_norms
BY_NAME = {case.name: case for case in CASES}
# Norms of each kind that a model of two blocks has.
SWAPPED = {
    "bert-mlm": {"LayerNorm": 6},
    "vit": {"LayerNorm": 5},
    "clip": {"LayerNorm": 11},
    "gpt2-right": {"LayerNorm": 5},
    "albert": {"LayerNorm": 3},
    "t5": {"T5LayerNorm": 12},
    "llama-right": {"LlamaRMSNorm": 5},
    "mistral": {"MistralRMSNorm": 5},
    "llava": {"LayerNorm": 6, "LlamaRMSNorm": 5},
}


def built(name):
    return redrawn(BY_NAME[name].build())


def outputs(model, name, dtype):
    with torch.no_grad():
        found = floats(model(**cast(BY_NAME[name].inputs(), dtype)))
    return {part: value for part, value in found.items() if value.dim() > 0}  # the error of one number, a loss, is luck


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SWAPPED)
def test_outputs_obey_the_error_rule(name, dtype):
    plain, swapped, true = (built(name).to(kind) for kind in (dtype, dtype, torch.float64))
    keys = list(plain.state_dict())
    report = swap_norms(swapped)
    swap_norms(true)  # its own norms compute float64 in float32
    assert list(swapped.state_dict()) == keys and not report.left
    counts = {kind: sum(s.old == kind for s in report.swapped) for kind in SWAPPED[name]}
    assert counts == SWAPPED[name] and sum(counts.values()) == len(report.swapped)
    with vk.recorded() as served:
        found = outputs(swapped, name, dtype)
    norms = [impl for op, impl in served if op in ("layer_norm", "rms_norm")]
    assert len(norms) >= len(report.swapped) and set(norms) == {"cpp"}
    truth, eager = outputs(true, name, torch.float64), outputs(plain, name, dtype)
    assert found.keys() == eager.keys()
    for part, value in found.items():
        assert_close(f"{name}: {part}", value, eager[part], truth[part])


def test_what_is_left_is_told():
    model = BY_NAME["chameleon"].build()
    report = swap_norms(model)
    assert {(left.kind, left.reason) for left in report.left} == {("ChameleonLayerNorm", "no replacement for it is known")}
    assert str(report).startswith("swapped 5, left 4\n  5 x ChameleonRMSNorm -> FusedChameleonRMSNorm\n")
    again = swap_norms(model)
    assert not again.swapped and {left.reason for left in again.left} >= {"it has its new class already"}
    assert unswap(model) == 5 and type(model.norm).__name__ == "ChameleonRMSNorm"


def test_a_norm_with_code_of_its_own_is_left():
    model = T.GemmaModel(T.GemmaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                                       intermediate_size=37, vocab_size=99, head_dim=8, pad_token_id=0))  # fmt: skip
    report = swap_norms(model)  # its weight is added to 1
    assert not report.swapped and {left.kind for left in report.left} == {"GemmaRMSNorm"}


def test_swapped_models_are_copied_and_pickled():
    model, file = BY_NAME["t5"].build(), io.BytesIO()
    swap_norms(model)
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other.encoder.final_layer_norm) is type(model.encoder.final_layer_norm)
        assert unswap(other) == 12 and torch.equal(other.encoder.final_layer_norm.weight, model.encoder.final_layer_norm.weight)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("data", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["t5.modeling_t5.T5LayerNorm", "llama.modeling_llama.LlamaRMSNorm"])
def test_rms_norms_return_what_the_original_returns(kind, data, weight):
    module, name = kind.rsplit(".", 1)
    norm = getattr(__import__(f"transformers.models.{module}", fromlist=[name]), name)(24).to(weight)
    nn.init.normal_(norm.weight)
    x = torch.randn(5, 24).to(data)
    eager, wide = norm(x), copy.deepcopy(norm).double()
    swap_norms(norm), swap_norms(wide)
    assert_close(kind, norm(x), eager, wide(x.double()))


def vit():
    return T.ViTForImageClassification(T.ViTConfig(**IMAGE, num_labels=4))


def pictures(generator):
    """Stripes of one of four widths."""
    labels = torch.randint(0, 4, (8,), generator=generator)
    phase = torch.linspace(0, 3, 12) * (1 + labels[:, None])
    noise = torch.randn(8, 3, 12, 12, generator=generator)
    return {"pixel_values": phase.sin()[:, None, None, :] + 0.3 * noise, "labels": labels}


def llama():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    return T.LlamaForCausalLM(T.LlamaConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=40, pad_token_id=0))


def sentences(generator):
    tokens, real = words(generator)
    return {"input_ids": tokens, "attention_mask": real, "labels": tokens.masked_fill(real == 0, -100)}


def curve(build, batch, swapped):
    torch.manual_seed(0)
    model = build().train()
    if swapped:
        assert not swap_norms(model).left
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        loss = model(**batch(generator)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


CURVES = [(bert, masked_words, {"layer_norm": 6}), (vit, pictures, {"layer_norm": 5}), (llama, sentences, {"rms_norm": 5})]


@needs_kernel
@pytest.mark.parametrize(("build", "batch", "norms"), CURVES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_loss_falls_as_with_pytorchs_norms(build, batch, norms, monkeypatch):
    for fewest in ("FEWEST_ELEMENTS_TO_TRAIN", "FEWEST_RMS_ELEMENTS_TO_TRAIN"):
        monkeypatch.setattr(functional, fewest, 0)  # else so small a model trains on the reference
    expected = list(curve(build, batch, swapped=False))
    with vk.recorded() as served:
        found = list(curve(build, batch, swapped=True))
    assert served == [(op, "cpp") for op, count in norms.items() for _ in range(STEPS * count)]
    assert expected[-1] < 0.9 * expected[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0)
