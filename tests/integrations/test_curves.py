"""Fifty steps of training give the loss curve that sdpa gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlkernels as vk
from tests.integrations.tiny_models import IMAGE, TEXT, VOCABULARY, right, transformers

T = transformers
STEPS = 50


def words(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sentences that count upwards, so that a masked word can be told from its neighbours, and their padding."""
    real = right()[torch.randint(0, 3, (8,), generator=generator)]
    start = torch.randint(3, VOCABULARY // 2, (8, 1), generator=generator)
    return (start + torch.arange(11)).masked_fill(real == 0, 0), real


def masked_words(generator: torch.Generator) -> dict[str, Any]:
    tokens, real = words(generator)
    chosen = (torch.rand(tokens.shape, generator=generator) < 0.3) & (real == 1)
    chosen[:, 1] = True
    return {
        "input_ids": tokens.masked_fill(chosen, 1),
        "attention_mask": real,
        "labels": tokens.masked_fill(~chosen, -100),
    }


def pairs(generator: torch.Generator) -> dict[str, Any]:
    """The picture is the brighter the larger the sentence's first word is."""
    tokens, real = words(generator)
    shade = (tokens[:, 0].float() / VOCABULARY).view(-1, 1, 1, 1)
    pictures = shade * torch.linspace(-1, 1, 12).view(1, 1, 12, 1).expand(8, 3, 12, 12)
    tokens[torch.arange(8), real.sum(1) - 1] = VOCABULARY - 1  # CLIP reads its sentence at the largest id
    return {"input_ids": tokens, "attention_mask": real, "pixel_values": pictures, "return_loss": True}


def bert() -> nn.Module:
    return T.BertForMaskedLM(T.BertConfig(**TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def clip() -> nn.Module:
    text = dict(TEXT, bos_token_id=1, eos_token_id=VOCABULARY - 1, projection_dim=16)
    return T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=dict(IMAGE, projection_dim=16), projection_dim=16))


Batch = Callable[[torch.Generator], dict[str, Any]]


def curve(build: Callable[[], nn.Module], batch: Batch, implementation: str) -> Iterator[float]:
    torch.manual_seed(0)
    model = build().train()
    keys = list(model.state_dict())
    model.set_attn_implementation(implementation)
    assert list(model.state_dict()) == keys
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        loss = model(**batch(generator)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


@pytest.mark.parametrize(("build", "batch"), [(bert, masked_words), (clip, pairs)], ids=["bert", "clip"])
def test_the_loss_falls_as_under_sdpa(build, batch):
    vk.integrations.transformers.register()
    expected = list(curve(build, batch, "sdpa"))
    with vk.recorded() as served:
        found = list(curve(build, batch, "vlkernels"))
    assert len([op for op, _ in served if op == "attention"]) == STEPS * (2 if build is bert else 4)
    assert expected[-1] < 0.9 * expected[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0)
