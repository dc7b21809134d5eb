"""Under torch.compile(fullgraph=True) a model of packed ops keeps its graphs: lengths and tables are data."""

import random

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import vlkernels as vk

WIDTH, HEADS, VOCABULARY, PATCH = 32, 2, 50, 12


class PackedModel(nn.Module):
    """Embeddings, one block under a mask table, a masked-token loss and a contrastive loss, all on packed rows."""

    def __init__(self):
        super().__init__()
        self.words = nn.Parameter(torch.randn(VOCABULARY, WIDTH) * 0.1)
        self.kinds = nn.Parameter(torch.randn(2, WIDTH) * 0.1)
        self.patches = nn.Linear(PATCH, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out_bias = nn.Parameter(torch.zeros(WIDTH))
        self.norm, self.embed_norm = vk.FusedLayerNorm(WIDTH), vk.FusedLayerNorm(WIDTH)

    def forward(self, patches, ids, layout, mask, rows, targets, rng):
        kinds = layout.token_segment().clamp(min=0)
        words = vk.pack((torch.full_like(patches[..., 0], -1, dtype=torch.int64), ids), layout)
        dense = vk.pack((self.patches(patches), torch.zeros(*ids.shape, WIDTH)), layout)
        x = vk.embed_layer_norm(
            torch.stack((words, kinds.to(words.dtype)), 1), (self.words, self.kinds), self.embed_norm.weight,
            bias=self.embed_norm.bias, dense=dense, layout=layout, rng=rng, dropout_p=0.1, stream=0,
        )  # fmt: skip
        qkv = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        y = self.out(vk.attention_qkvpacked(qkv, layout=layout, mask=mask).flatten(1))
        x = vk.layer_norm(
            y, self.norm.weight, self.norm.bias, residual=x, linear_bias=self.out_bias,
            layout=layout, rng=rng, dropout_p=0.1, stream=1,
        )  # fmt: skip
        image, text = vk.segment_mean(x, layout, 0), vk.segment_mean(x, layout, 1)
        contrastive = vk.contrastive_loss(image, text, 10.0)
        return contrastive + vk.linear_cross_entropy(vk.take_rows(x, rows), self.words, targets)


def batch(generator):
    size = generator.randint(2, 9)  # the framework keeps a graph of its own for every length of 1
    lengths = [[generator.randint(2, 6), generator.randint(2, 9)] for _ in range(size)]
    layout = vk.SegmentLayout(lengths)
    images, texts = (max(row[s] for row in lengths) for s in (0, 1))
    masked = generator.randint(2, 6)
    return (
        torch.randn(size, images, PATCH),
        torch.randint(0, VOCABULARY, (size, texts)),
        layout,
        generator.choice([vk.SegmentMask.full(2), vk.SegmentMask.prefix_lm()]),
        torch.randint(0, layout.num_tokens, (masked,)),
        torch.randint(0, VOCABULARY, (masked,)),
        vk.Rng(1),
    )


def gradients(function, model, arguments):
    model.zero_grad(set_to_none=True)
    loss = function(*arguments)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def test_at_most_two_graphs_over_a_thousand_layouts():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model, generator = PackedModel(), random.Random(0)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for trial in range(1000):
        arguments = batch(generator)
        if trial % 50:
            compiled(*arguments)
            continue
        found, eager = (gradients(function, model, arguments) for function in (compiled, model))
        for mine, expected in zip(found, eager, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2
