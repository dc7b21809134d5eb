"""The traps of transformers' attention plug-in, one by one."""

from __future__ import annotations

import gc
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlkernels as vk
from tests.integrations.comparing import attention_calls
from tests.integrations.tiny_models import LLAMA, TEXT, holes, ids, labels, left, redrawn, right, transformers
from vlkernels.integrations import padded
from vlkernels.integrations.transformers import attention_forward, attention_mask

masking_utils = pytest.importorskip("transformers.masking_utils")


@pytest.fixture(autouse=True, scope="module")
def registered():
    vk.integrations.transformers.register()


def bert(**more: Any) -> nn.Module:
    return redrawn(transformers.BertModel(transformers.BertConfig(**TEXT, **more), add_pooling_layer=False)).double()


def llama() -> nn.Module:
    return redrawn(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))).double()


def same_as_sdpa(model: nn.Module, rows: Tensor | None = None, **inputs: Any) -> None:
    """The first output equals sdpa's, where ``rows`` says that it is read."""
    outputs = []
    for implementation in ("sdpa", "vlkernels"):
        model.set_attn_implementation(implementation)
        with torch.no_grad(), vk.recorded() as served:
            outputs.append(model(**inputs)[0])
    assert served
    rows = torch.ones((), dtype=torch.bool) if rows is None else rows.bool()[..., None]
    torch.testing.assert_close(outputs[1] * rows, outputs[0] * rows, rtol=1e-9, atol=1e-9)


def module(**attributes: Any) -> Any:
    return SimpleNamespace(**attributes)


def qkv(queries: int = 6, keys: int = 6, heads: int = 4, kv_heads: int = 4) -> list[Tensor]:
    return [torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in ((heads, queries), (kv_heads, keys), (kv_heads, keys))]


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


# 1. An attention without a mask function drops padding and causality.
def test_without_its_mask_function_the_attention_would_be_wrong():
    transformers.AttentionInterface.register("half_registered", attention_forward)
    for model, mask in ((bert(), right()), (llama(), left())):
        outputs = []
        for implementation in ("vlkernels", "half_registered"):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                outputs.append(model(input_ids=ids(), attention_mask=mask)[0] * mask[..., None])
        assert (outputs[0] - outputs[1]).abs().max() > 1e-3


# 2. Tensors come transposed, and go out as [B, L, H, K], contiguous.
def test_form_of_the_output():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(5, 6))
    out, weights = attention_forward(module(is_causal=False), q, k, v, None)
    assert out.shape == (2, 5, 4, 8) and out.is_contiguous() and weights is None


# 3. Masks by pairs: bool, float with a gradient, one row for all queries, given by the user.
def test_float_masks_get_their_gradient():
    q, k, v = qkv()
    mask = torch.randn(1, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    out, _ = attention_forward(module(is_causal=True), q, k, v, mask)
    expected = sdpa(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected)
    for found, true in zip(torch.autograd.grad(out.square().sum(), mask), torch.autograd.grad(expected.square().sum(), mask)):
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("shape", [(2, 1, 1, 6), (1, 1, 6, 6), (2, 4, 6, 6), (1, 4, 1, 6), (1, 1, 1, 6)])
def test_masks_of_every_shape(shape):
    q, k, v = qkv()
    visible = torch.rand(shape) > 0.4
    visible[..., 0] = True
    for mask in (visible, torch.where(visible, 0.5, -1e30).double()):
        out, _ = attention_forward(module(is_causal=True), q, k, v, mask)
        torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=mask))


HIDDEN = torch.finfo(torch.float32).min


def _additive(case: str) -> Tensor:
    mask = torch.zeros(2, 1, 6, 6)
    mask[0, ..., :2] = mask[1, ..., 5] = HIDDEN
    if case == "one row":
        return mask[:, :, :1].clone()
    if case == "another value":
        mask[0, ..., 3] = -1.0
    if case == "another row":
        mask[1, 0, 4, 4] = HIDDEN
    if case == "empty sample":
        mask[0] = HIDDEN
    return mask.requires_grad_(case == "gradient")


@pytest.mark.parametrize(("case", "served"), [
    ("padding", "cpp"), ("one row", "cpp"), ("another value", "torch"), ("another row", "torch"), ("empty sample", "torch"),
    ("gradient", "torch"),
])  # fmt: skip
def test_additive_masks_that_are_padding_alone_are_read_as_that(case, served):
    q, k, v = (x.float() for x in qkv())
    mask = _additive(case)
    with vk.recorded() as calls:
        out, _ = attention_forward(module(is_causal=True), q, k, v, mask)
    assert attention_calls(calls) == [served]
    torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=mask))


def test_masks_by_pairs_given_by_the_user():
    visible = torch.rand(3, 1, 11, 11) > 0.4
    visible |= torch.eye(11, dtype=torch.bool)
    same_as_sdpa(bert(), input_ids=ids(), attention_mask=visible)
    same_as_sdpa(llama(), input_ids=ids(), attention_mask=visible.tril())
    same_as_sdpa(llama(), input_ids=ids(), attention_mask=torch.where(visible, 0.0, -1e9).double())


# 4. Causality is in three places.
def test_the_calls_word_counts_before_the_modules():
    q, k, v = qkv()
    causal, full = sdpa(q, k, v, is_causal=True), sdpa(q, k, v)
    for owner, word, expected in (
        (module(is_causal=False), True, causal),
        (module(is_causal=True), False, full),
        (module(is_causal=True), None, causal),
        (module(is_causal=False), None, full),
        (module(), None, causal),
    ):
        torch.testing.assert_close(attention_forward(owner, q, k, v, None, is_causal=word)[0], expected)


def test_one_query_sees_every_key():
    q, k, v = qkv(1, 6)
    torch.testing.assert_close(attention_forward(module(is_causal=True), q, k, v, None)[0], sdpa(q, k, v))


def test_causality_without_a_mask_needs_as_many_keys_as_queries():
    with pytest.raises(ValueError, match="causal attention of 3 queries to 6 keys needs a mask"):
        attention_forward(module(is_causal=True), *qkv(3, 6), None)


# 5. A position bias comes beside the mask.
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "padding", "pairs", "float"])
def test_position_bias_causality_and_padding_together(mask, causal):
    q, k, v = qkv()
    bias = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    real = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    visible = real[:, None, None, :] if mask else torch.ones(1, 1, 1, 6, dtype=torch.bool)
    if causal:
        visible = visible & torch.ones(6, 6, dtype=torch.bool).tril()
    given = {None: None, "padding": real, "pairs": visible.expand(-1, -1, 6, -1).clone(), "float": visible.double().log()}[mask]
    out, _ = attention_forward(module(is_causal=causal), q, k, v, given, position_bias=bias)
    expected = sdpa(q, k, v, attn_mask=torch.where(visible, bias, -torch.inf))
    if causal and mask:
        out, expected = out * real[..., None, None], expected * real[..., None, None]
    torch.testing.assert_close(out, expected.nan_to_num())


def test_a_position_bias_that_does_not_fit():
    with pytest.raises(ValueError, match=r"position_bias must broadcast to .* = \[2, 4, 6, 6\], got float32 \[1, 4, 6, 9\]"):
        attention_forward(module(is_causal=False), *qkv(), None, position_bias=torch.randn(1, 4, 6, 9))


def test_a_position_bias_of_the_keys_alone():
    q, k, v = qkv()
    bias = torch.randn(1, 4, 1, 6, dtype=torch.float64)
    out, _ = attention_forward(module(is_causal=False), q, k, v, None, position_bias=bias)
    torch.testing.assert_close(out, sdpa(q, k, v, attn_mask=bias))


# 6. Other arguments: those that change nothing pass, the others are refused.
def test_arguments_that_would_be_left_out_are_refused():
    q, k, v = qkv()
    harmless = {"softcap": None, "output_attentions": False, "use_cache": True, "position_ids": torch.arange(6)}
    attention_forward(module(), q, k, v, None, **harmless)
    for more, message in (
        ({"softcap": 30.0}, "does not serve softcap"),
        ({"output_attentions": True}, "stores no probabilities for output_attentions=True"),
        ({"head_mask": torch.ones(4)}, "does not serve head_mask"),
        ({"s_aux": torch.ones(4)}, "does not serve s_aux"),
        ({"sinks": torch.ones(4)}, "does not serve sinks"),
        ({"indices": torch.ones(4)}, "does not serve indices: it selects no keys"),
        ({"block_indices": torch.ones(4)}, "does not serve block_indices: it selects no keys"),
        ({"cache": object()}, "does not serve cache"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_forward(module(), q, k, v, None, **more)


def test_asking_a_model_for_its_probabilities_is_refused():
    model = bert()
    model.set_attn_implementation("vlkernels")
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids=ids(), output_attentions=True)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 5, dtype=torch.bool), r"\[B, Lk\] = \[2, 6\], got bool \[2, 5\]"),
        (torch.ones(3, 6, dtype=torch.bool), r"\[B, Lk\] = \[2, 6\], got bool \[3, 6\]"),
        (torch.zeros(2, 6, 6), r"\[B, H, Lq, Lk\] = \[2, 4, 6, 6\], got float32 \[2, 6, 6\]"),
        (torch.zeros(2, 3, 6, 6), r"\[B, H, Lq, Lk\] = \[2, 4, 6, 6\], got float32 \[2, 3, 6, 6\]"),
        (torch.zeros(2, 6), r"\[B, H, Lq, Lk\] = \[2, 4, 6, 6\], got float32 \[2, 6\]"),
        (torch.ones(2, 1, 6, 6).long(), "attention_mask by pairs must be bool or floating, got int64"),
        ("causal", r"\[B, H, Lq, Lk\] = \[2, 4, 6, 6\], got str \[\]"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        attention_forward(module(), *qkv(), mask)


# 7. The mask function is called with many keywords; what it cannot say by padding it says by pairs.
def mask_of(config: Any, maker: str = "create_causal_mask", queries: int = 11, **more: Any) -> Any:
    config._attn_implementation = "vlkernels"
    arguments = {"inputs_embeds": torch.zeros(3, queries, 32), "attention_mask": right(), "past_key_values": None, **more}
    return getattr(masking_utils, maker)(config, **arguments)


def test_padding_stays_small():
    config = transformers.LlamaConfig(**LLAMA)
    assert mask_of(config).shape == (3, 11)
    seen = mask_of(config, "create_bidirectional_mask")
    assert seen.shape == (3, 1, 11, 11) and seen.untyped_storage().nbytes() == 3 * 11
    assert mask_of(config, attention_mask=None) is None
    assert mask_of(config, "create_bidirectional_mask", attention_mask=None) is None


def test_a_window_wider_than_the_keys_is_no_window():
    assert mask_of(transformers.MistralConfig(**LLAMA, sliding_window=12), "create_sliding_window_causal_mask").shape == (3, 11)
    narrow = mask_of(transformers.MistralConfig(**LLAMA, sliding_window=4), "create_sliding_window_causal_mask")
    assert narrow.shape == (3, 1, 11, 11) and not narrow[1, 0, 10, 6] and narrow[1, 0, 10, 7]


@pytest.mark.parametrize("combination", ["or_mask_function", "and_mask_function"])
@pytest.mark.parametrize("maker", ["create_causal_mask", "create_bidirectional_mask"])
def test_masks_with_a_function_of_the_model_are_sdpas(maker, combination):
    config = transformers.LlamaConfig(**LLAMA)
    more = {combination: lambda b, h, q, k: (k + q) % 3 == 0}
    found = mask_of(config, maker, **more)
    config._attn_implementation = "sdpa"
    arguments = {"inputs_embeds": torch.zeros(3, 11, 32), "attention_mask": right(), "past_key_values": None}
    assert torch.equal(found, getattr(masking_utils, maker)(config, **arguments, **more))


def test_a_mask_that_must_be_there_is_there():
    config = transformers.LlamaConfig(**LLAMA)
    assert mask_of(config, attention_mask=None, allow_is_causal_skip=False).shape == (3, 1, 11, 11)


@pytest.mark.parametrize("offset", [0, 3, torch.tensor(3)])
def test_the_empty_places_of_a_static_cache_are_not_seen(offset):
    sizes = {"batch_size": 3, "q_length": 4, "kv_length": 20, "q_offset": offset}
    own = masking_utils.sdpa_mask(**sizes, allow_is_causal_skip=False)
    assert torch.equal(attention_mask(**sizes, mask_function=masking_utils.causal_mask_function), own)


def test_other_patterns_are_masks_by_pairs():
    def own(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k % 2 == 0)

    sizes = {"batch_size": 3, "q_length": 6, "kv_length": 6, "mask_function": own}
    assert torch.equal(attention_mask(**sizes), masking_utils.sdpa_mask(**sizes, allow_is_causal_skip=False))


def test_packed_position_ids():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0]]).expand(3, -1)
    same_as_sdpa(llama(), input_ids=ids(), position_ids=positions)


# Caches.
@pytest.mark.parametrize("side", [right, left, holes])
@pytest.mark.parametrize("first", [4, 10])
def test_the_rest_of_a_text_after_a_cache(side, first):
    """Several new queries, and one, behind keys that are there already."""
    model, mask, outputs = llama(), side(), []
    for implementation in ("sdpa", "vlkernels"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            past = model(input_ids=ids()[:, :first], attention_mask=mask[:, :first], use_cache=True).past_key_values
            outputs.append(model(input_ids=ids()[:, first:], attention_mask=mask, past_key_values=past).logits)
    rows = mask[:, first:, None]
    torch.testing.assert_close(outputs[1] * rows, outputs[0] * rows, rtol=1e-9, atol=1e-9)


def test_a_cache_without_a_mask():
    model, outputs = llama(), []
    for implementation in ("sdpa", "vlkernels"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            past = model(input_ids=ids()[:, :4], use_cache=True).past_key_values
            outputs.append(model(input_ids=ids()[:, 4:], past_key_values=past).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(cache):
    model, texts = llama(), []
    for implementation in ("sdpa", "vlkernels"):
        model.set_attn_implementation(implementation)
        more = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
        texts.append(model.generate(ids(), attention_mask=left(), max_new_tokens=8, do_sample=False, eos_token_id=None, **more))
    assert torch.equal(*texts)


def test_generation_with_cross_attention_and_position_bias():
    sizes = dict(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    model, texts = redrawn(transformers.T5ForConditionalGeneration(config)).double(), []
    for implementation in ("sdpa", "vlkernels"):
        model.set_attn_implementation(implementation)
        texts.append(model.generate(ids(), attention_mask=holes(), max_new_tokens=8, do_sample=False, eos_token_id=None))
    assert torch.equal(*texts)


# One forward makes what its layers share once.
def test_layers_share_what_is_made_from_a_mask(monkeypatch):
    made, own = [], padded.Padding.__init__
    monkeypatch.setattr(padded.Padding, "__init__", lambda self, real: made.append(1) or own(self, real))
    for model in (bert(), llama()):
        model.set_attn_implementation("vlkernels")
        made.clear()
        with vk.recorded() as served:
            model(input_ids=ids(), attention_mask=right())
        assert made == [1] and len(attention_calls(served)) == 2
    del model
    gc.collect()
    assert not any(isinstance(value, padded.Padding) for _, held in padded._made.values() for value in held.values())


# Training.
@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_survives_activation_checkpointing(reentrant):
    config = transformers.BertConfig(**TEXT, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2)
    model = redrawn(transformers.BertForMaskedLM(config)).train()
    model.set_attn_implementation("vlkernels")
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        model(input_ids=ids(), attention_mask=right(), labels=labels()()).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for before, after in zip(*gradients, strict=True):
        torch.testing.assert_close(after, before)


def test_dropout_is_for_training_only():
    config = transformers.BertConfig(**TEXT, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    model = redrawn(transformers.BertModel(config, add_pooling_layer=False))
    model.set_attn_implementation("vlkernels")
    still = [model(input_ids=ids())[0] for _ in range(2)]
    moved = [model.train()(input_ids=ids())[0] for _ in range(2)]
    assert torch.equal(*still) and not torch.equal(*moved)


def test_autocast():
    model = llama().float()
    model.set_attn_implementation("vlkernels")
    with torch.autocast("cpu", torch.bfloat16), vk.recorded() as served:
        model(input_ids=ids(), attention_mask=right(), labels=labels()()).loss.backward()
    assert len(served) >= 2


def test_compiled_models_give_the_same():
    model = llama()
    model.set_attn_implementation("vlkernels")
    expected = model(input_ids=ids(), attention_mask=left())[0] * left()[..., None]
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(input_ids=ids(), attention_mask=left())[0] * left()[..., None], expected)


def test_registering_twice_changes_nothing():
    vk.integrations.transformers.register()
    assert masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["vlkernels"] is attention_mask


def test_an_old_transformers_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.40.0"))
    with pytest.raises(ValueError, match="transformers must be 5.0 or later, got 4.40.0"):
        vk.integrations.transformers.register()
