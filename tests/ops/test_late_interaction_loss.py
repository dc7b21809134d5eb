"""What is special to the late-interaction loss: tiles, ties, published forms, memory, who serves, errors."""

import math
import os
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import vlkernels as vk
from torch.utils._python_dispatch import TorchDispatchMode

from vlkernels.core import dispatch, triton_runtime
from vlkernels.core.spec import InputMaker
from vlkernels.ops.late_interaction_loss import driver, reference, spec, tiles, torch_kernels
from vlkernels.ops.late_interaction_loss.gpu import arithmetic
from vlkernels.ops.late_interaction_loss.spec import SPECS

BOTH = pytest.mark.parametrize("similarity", ["mean_max", "max"])
IMAGES, TEXTS = [5, 1, 9, 3, 3, 7, 2, 11, 4, 6, 1], [2, 6, 1, 4, 3, 1, 8, 2, 5, 1, 3]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that little inputs have many, some of which are kept and some made again."""
    monkeypatch.setattr(torch_kernels, "TILE", 12)
    monkeypatch.setattr(tiles, "KEPT_BYTES", 700)


def inputs(similarity="mean_max", images=IMAGES, texts=TEXTS, width=6, dtype=torch.float64, **options):
    fill = InputMaker(dtype)
    return {
        "image_tokens": fill.normal(sum(images), width),
        "text_tokens": fill.normal(sum(texts), width),
        "logit_scale": torch.tensor([2.5], dtype=dtype, requires_grad=True),
        "image_layout": vk.SegmentLayout([[n] for n in images]),
        "text_layout": vk.SegmentLayout([[n] for n in texts]),
        "similarity": similarity,
        "label_smoothing": 0.1,
    } | options


def value_and_gradients(arguments, impl):
    tensors = [arguments[name] for name in ("image_tokens", "text_tokens", "logit_scale")]
    loss = vk.late_interaction_loss(**arguments, impl=impl)
    return loss.detach(), *torch.autograd.grad(loss * 3, tensors)


def assert_both_agree(arguments, **tolerance):
    mine, true = (value_and_gradients(arguments, impl) for impl in ("torch", "reference"))
    for tensor, expected in zip(mine, true, strict=True):
        torch.testing.assert_close(tensor, expected, **(tolerance or {"rtol": 1e-11, "atol": 1e-12}))


@BOTH
def test_many_tiles_give_what_all_products_give(similarity, small_tiles):
    assert_both_agree(inputs(similarity))


@BOTH
def test_lengths_that_only_a_device_knows(similarity, small_tiles, monkeypatch):
    """There blocks are as wide as the longest sample may be, in the order of the batch."""
    monkeypatch.setattr(torch_kernels, "_known_to_host", lambda lengths: False)
    arguments = inputs(similarity, images=[5, 1, 2], texts=[3, 3, 1])
    arguments["image_layout"] = arguments["image_layout"].take(torch.tensor([1, 0, 2, 2]))
    arguments["text_layout"] = arguments["text_layout"].take(torch.tensor([1, 2, 0, 1]))
    fill = InputMaker(torch.float64)
    arguments["image_tokens"], arguments["text_tokens"] = fill.normal(20, 6), fill.normal(12, 6)
    assert_both_agree(arguments)


@BOTH
def test_value_without_gradients_is_the_same(similarity, small_tiles):
    arguments = inputs(similarity)
    with torch.no_grad():
        alone = vk.late_interaction_loss(**arguments, impl="torch")
    torch.testing.assert_close(alone, value_and_gradients(arguments, "torch")[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.99])
@BOTH
def test_a_share_of_tokens_is_the_loss_of_those_alone(similarity, share, small_tiles):
    """Those whose best product with any token of the other side is largest, chosen one by one here."""
    arguments = inputs(similarity, token_share=share)
    sides = {"image": (arguments["image_tokens"], IMAGES), "text": (arguments["text_tokens"], TEXTS)}
    products = (arguments["image_tokens"] @ arguments["text_tokens"].T).detach()
    alone = dict(arguments, token_share=1.0)
    for (side, (tokens, lengths)), best in zip(sides.items(), (products.amax(1), products.amax(0))):
        chosen = []
        for start, length in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths):
            ranked = sorted(range(start, start + length), key=lambda row: -best[row])
            chosen.append(sorted(ranked[: math.ceil(share * length)]))
        alone[f"{side}_tokens"] = tokens[torch.tensor([row for rows in chosen for row in rows])]
        alone[f"{side}_layout"] = vk.SegmentLayout([[len(rows)] for rows in chosen])
    inputs_of_both = [arguments[name] for name in ("image_tokens", "text_tokens", "logit_scale")]
    expected = vk.late_interaction_loss(**alone, impl="reference")
    true = torch.autograd.grad(expected, inputs_of_both)
    for impl in ("torch", "reference"):
        loss = vk.late_interaction_loss(**arguments, impl=impl)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, inputs_of_both), true, rtol=1e-11, atol=1e-13)


def test_choosing_tokens_holds_no_matrix_of_them(small_tiles):
    arguments = inputs(images=IMAGES * 4, texts=TEXTS * 4)
    sides = [
        reference.Side.of(arguments[f"{side}_tokens"].detach(), arguments[f"{side}_layout"]) for side in ("image", "text")
    ]
    with LargestTensor() as largest:
        reference.keep_salient(*sides, 0.25, torch_kernels.salience)
    assert largest.numel <= max(side.tokens.numel() for side in sides)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@BOTH
def test_the_definition_pair_by_pair(similarity, impl):
    arguments = inputs(similarity, label_smoothing=0.0)
    images = arguments["image_tokens"].detach().split(IMAGES)
    texts = arguments["text_tokens"].detach().split(TEXTS)
    of_images, of_texts = torch.empty(2, len(IMAGES), len(TEXTS), dtype=torch.float64)
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            products = image @ text.T
            of_images[i, j] = products.max(1).values.mean() if similarity == "mean_max" else products.max()
            of_texts[j, i] = products.max(0).values.mean() if similarity == "mean_max" else products.max()
    pairs = torch.arange(len(images))
    expected = (F.cross_entropy(2.5 * of_images, pairs) + F.cross_entropy(2.5 * of_texts, pairs)) / 2
    loss = vk.late_interaction_loss(**arguments, impl=impl)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_queries_against_one_text_token_are_blip_2_s(impl):
    pairs, queries, width = 7, 5, 8
    fill = InputMaker(torch.float64)
    image_feats, text_feat = fill.normal(pairs, queries, width), fill.normal(pairs, width)
    sim_q2t = torch.matmul(image_feats.unsqueeze(1), text_feat.unsqueeze(-1)).squeeze(-1)
    sim_t2q = torch.matmul(text_feat.unsqueeze(1).unsqueeze(1), image_feats.permute(0, 2, 1)).squeeze(2)
    targets = torch.arange(pairs)
    expected = (
        F.cross_entropy(sim_q2t.max(-1).values / 0.07, targets, label_smoothing=0.1)
        + F.cross_entropy(sim_t2q.max(-1).values / 0.07, targets, label_smoothing=0.1)
    ) / 2
    loss = vk.late_interaction_loss(
        image_feats.flatten(0, 1),
        text_feat,
        1 / 0.07,
        image_layout=vk.SegmentLayout([[queries]] * pairs),
        text_layout=vk.SegmentLayout([[1]] * pairs),
        similarity="max",
        label_smoothing=0.1,
        impl=impl,
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    mine, true = (torch.autograd.grad(value, (image_feats, text_feat)) for value in (loss, expected))
    torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("similarity, width", [("mean_max", 1), ("mean_max", 2), ("max", 1), ("max", 2)])
def test_the_first_of_equal_maxima_takes_the_gradient(similarity, width, small_tiles):
    """Small integers: products are exact whatever the order, and most maxima are met several times."""
    arguments = inputs(similarity, width=width, dtype=torch.float32, logit_scale=0.5)
    for name in ("image_tokens", "text_tokens"):
        arguments[name] = arguments[name].detach().round().clamp(-1, 1).requires_grad_()
    mine, true = (
        torch.autograd.grad(
            vk.late_interaction_loss(**arguments, impl=impl), (arguments["image_tokens"], arguments["text_tokens"])
        )
        for impl in ("torch", "reference")
    )
    torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@BOTH
def test_an_equal_token_later_gets_nothing(similarity, impl):
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    texts = torch.tensor([[1.0, 0.2], [0.1, 1.0]], requires_grad=True)
    layouts = {"image_layout": vk.SegmentLayout([[2], [1]]), "text_layout": vk.SegmentLayout([[1], [1]])}
    options = {"similarity": similarity, "impl": impl}
    vk.late_interaction_loss(images, texts, 1.0, **layouts, **options).backward()
    if similarity == "max":
        assert images.grad[0].abs().max() > 0.1 and images.grad[1].abs().max() == 0
    else:  # each has a mean of its own, the maximum of the texts is the first one's
        assert images.grad[0].abs().max() > 2 * images.grad[1].abs().max() > 0.05


@BOTH
def test_rows_of_nobody_are_not_read(similarity):
    arguments = inputs(similarity)
    expected = value_and_gradients(arguments, "torch")
    arguments["text_layout"] = vk.SegmentLayout([[n] for n in TEXTS], capacity=sum(TEXTS) + 3)
    spare = torch.full((3, 6), torch.nan, dtype=torch.float64)
    arguments["text_tokens"] = torch.cat((arguments["text_tokens"].detach(), spare)).requires_grad_()
    for impl in ("torch", "reference"):
        loss, _, toward_texts, _ = value_and_gradients(arguments, impl)
        torch.testing.assert_close(loss, expected[0])
        assert torch.equal(toward_texts[-3:], torch.zeros(3, 6, dtype=torch.float64))
        torch.testing.assert_close(toward_texts[:-3], expected[2])


@BOTH
def test_places_are_bytes_up_to_256_tokens(similarity):
    for longest, dtype in ((256, torch.uint8), (257, torch.int16)):
        arguments = inputs(similarity, images=[longest, 2], texts=[3, longest])
        assert_both_agree(arguments)
        block = torch_kernels._Block(*(torch.tensor([longest]),) * 2, *(torch.zeros(1, longest),) * 3, place=0)
        assert block.narrow(torch.tensor([longest - 1, longest])).tolist() == [longest - 1] * 2
        assert block.narrow(torch.tensor([0])).dtype == dtype


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def raw_arguments(arguments, gradient=True):
    images, texts = arguments["image_layout"], arguments["text_layout"]
    tensors = [arguments[name].detach() for name in ("image_tokens", "text_tokens", "logit_scale")]
    sides = [reference.Side.of(*side) for side in zip(tensors, (images, texts))]
    bounds, longest = [b for side in sides for b in (side.starts, side.lengths)], [side.longest for side in sides]
    return *tensors, *bounds, *longest, arguments["similarity"], 0.1, "", None, "mean", "gather", gradient


@BOTH
def test_no_tensor_is_larger_than_the_tokens(similarity, small_tiles):
    arguments = inputs(similarity, images=IMAGES * 4, texts=TEXTS * 4)
    with LargestTensor() as largest:
        torch_kernels.late_interaction_loss(*raw_arguments(arguments))
    assert largest.numel <= 4 * sum(IMAGES) * 6 < (4 * len(IMAGES)) ** 2


@BOTH
def test_what_is_kept_between_the_visits_is_bounded(similarity, small_tiles, monkeypatch):
    made, visits = [], []
    make, blocks = tiles.Tiles.__init__, torch_kernels.TorchArithmetic.blocks
    monkeypatch.setattr(tiles.Tiles, "__init__", lambda self, *a: (make(self, *a), made.append(self))[0])
    monkeypatch.setattr(torch_kernels.TorchArithmetic, "blocks", lambda *a: visits.append(list(blocks(*a))) or visits[-1])
    torch_kernels.late_interaction_loss(*raw_arguments(inputs(similarity)))
    kept = made[0]._kept.values()
    assert 0 < len(kept) < len(visits[0])
    assert sum(part.nbytes for tile in kept for part in tile.parts) <= tiles.KEPT_BYTES
    assert len({part.untyped_storage().data_ptr() for tile in kept for part in tile.parts}) == 1
    torch_kernels.late_interaction_loss(*raw_arguments(inputs(similarity), gradient=False))
    assert not made[1]._kept


@BOTH
def test_triton_never_waits_for_a_device(similarity, monkeypatch):
    """Without data: whatever the host would read of a tensor raises."""
    pytest.importorskip("triton")
    launched = []
    monkeypatch.setattr(triton_runtime.Launch, "run", lambda launch: launched.append(launch))
    monkeypatch.setattr(arithmetic, "TILE_BYTES", 300)
    real = raw_arguments(inputs(similarity, dtype=torch.bfloat16))
    given = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in real]
    loss, *gradients = arithmetic.late_interaction_loss(*given)
    assert loss.shape == () and [t.shape for t in gradients] == [t.shape for t in given[:3]]
    assert len(launched) > 20


def test_float16_gradients_survive_until_the_loss_scale():
    arguments = inputs(dtype=torch.float16, images=[4] * 60, texts=[3] * 60, width=32, logit_scale=1.0)
    exact = inputs(images=[4] * 60, texts=[3] * 60, width=32, logit_scale=1.0)
    for given, impl in ((arguments, "torch"), (exact, "reference")):
        (vk.late_interaction_loss(**given, impl=impl) * 2.0**16).backward()
    for name in ("image_tokens", "text_tokens"):
        mine, true = arguments[name].grad.double(), exact[name].grad
        assert (mine - true).abs().max() < 2e-3 * true.abs().max()


def test_auto_takes_tiles_for_many_products_and_all_at_once_for_few():
    for pairs, expected in ((4, "reference"), (400, "torch")):
        tokens, layout = torch.randn(3 * pairs, 2), vk.SegmentLayout([[3]] * pairs)
        with dispatch.recorded() as served:
            vk.late_interaction_loss(tokens, tokens, 1.0, image_layout=layout, text_layout=layout)
        assert served == [("late_interaction_loss", expected)]


def test_one_graph_serves_every_number_of_tokens():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def call(images, texts, scale, image_layout, text_layout):
        layouts = {"image_layout": image_layout, "text_layout": text_layout}
        return vk.late_interaction_loss(images, texts, scale, **layouts, impl="torch")

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for pairs in (5, 9, 13, 30):
        image_layout, text_layout = (vk.SegmentLayout([[k * pairs]] + [[k]] * (pairs - 1)) for k in (2, 3))
        images, texts = (torch.randn(layout.num_tokens, 4) for layout in (image_layout, text_layout))
        given = images, texts, 3.0, image_layout, text_layout
        torch.testing.assert_close(compiled(*given), call(*given))
    assert len(graphs) <= 2


EMPTY = {"tokens": torch.zeros(0, 3), "layout": vk.SegmentLayout(torch.zeros(0, 1, dtype=torch.int32))}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_tokens": torch.zeros(4, 3)}, r"image_tokens must be \[num_tokens, D\] = \[5, any\], got \[4, 3\]"),
        ({"text_tokens": torch.zeros(3, 4)}, r"text_tokens must be \[num_tokens, D\] = \[3, 3\], got \[3, 4\]"),
        ({"text_tokens": torch.zeros(3, 3).half()}, "text_tokens must be float32, got float16"),
        ({"image_tokens": torch.zeros(5, 3).long()}, "image_tokens must be one of .*, got int64"),
        ({"logit_scale": torch.ones(2)}, r"logit_scale must be a number or have shape \(\) or \(1,\), got \[2\]"),
        ({"image_layout": [2, 3]}, "image_layout must be a SegmentLayout, got a list"),
        ({"text_layout": vk.SegmentLayout([[3]])}, "text_layout must have the samples of image_layout = 2, got 1"),
        ({"text_layout": vk.SegmentLayout([[3], [0]])}, "text_layout must give every sample a token, sample 1 has none"),
        ({"image_layout": vk.SegmentLayout([[0], [5]])}, "image_layout must give every sample a token, sample 0 has none"),
        ({"similarity": "mean"}, "similarity must be \"mean_max\" or \"max\", got 'mean'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"token_share": 0.0}, r"token_share must be in \(0, 1\], got 0.0"),
        ({"token_share": 1.5}, r"token_share must be in \(0, 1\], got 1.5"),
        (
            {f"{side}_{kind}": value for side in ("image", "text") for kind, value in EMPTY.items()},
            "a batch must hold at least one pair, got N = 0 on one process",
        ),
        ({"rank_counts": (1, 1)}, r"rank_counts must hold one count for each of 1 ranks, got \[1, 1\]"),
        ({"rank_counts": (5,)}, r"rank_counts must be 2 at rank 0, the rows it has, got \[5\]"),
        ({"rank_reduction": "max"}, 'rank_reduction must be "mean" or "sum", got "max"'),
        ({"exchange": "all"}, 'exchange must be "gather" or "ring", got "all"'),
        ({"group": "world"}, "group must be a torch.distributed process group that holds this rank, got 'world'"),
    ],
)
def test_mistakes_are_one_clear_line(change, message):
    arguments = {
        "image_tokens": torch.zeros(5, 3),
        "text_tokens": torch.zeros(3, 3),
        "logit_scale": 1.0,
        "image_layout": vk.SegmentLayout([[2], [3]]),
        "text_layout": vk.SegmentLayout([[1], [2]]),
    }
    with pytest.raises(ValueError, match=message):
        vk.late_interaction_loss(**arguments | change)


@pytest.mark.parametrize("case", ["queries", "pairs", "duplicates, any two"])
def test_the_dense_peer_computes_the_same(case):
    arguments = next(c for c in SPECS[0].cases if c.name == case).make(InputMaker(torch.float64))
    dense, _ = SPECS[0].peers["dense"].prepare(**arguments)
    torch.testing.assert_close(dense(), vk.late_interaction_loss(**arguments, impl="torch"))


def summed_maxima(queries, documents):
    return torch.einsum("ipd,jtd->ijpt", queries, documents).amax(3).sum(2)


@pytest.mark.parametrize("wrong", (False, True))
def test_kernels_for_one_direction_are_called_twice_and_compared(wrong, monkeypatch):
    """By stand-ins with the signatures of the libraries; samples of equal length are a view of the packed tokens."""

    def batched(queries, documents, shared_docs=True, doc_lengths=None, query_lengths=None):
        return summed_maxima(queries, documents) * (1.1 if wrong else 1)

    def varlen(queries, documents, cu_queries, cu_documents, longest_query=None, longest_document=None):
        sides = (queries, cu_queries, longest_query), (documents, cu_documents, longest_document)
        return batched(*(tokens.view(len(bounds) - 1, longest, -1) for tokens, bounds, longest in sides))

    monkeypatch.setitem(sys.modules, "flash_maxsim", types.SimpleNamespace(flash_maxsim_batched_train=batched))
    monkeypatch.setitem(sys.modules, "late_interaction_kernels", types.SimpleNamespace(maxsim_varlen=varlen))
    row = spec.benchmarks(shrink=64)["filip n256 p49 t32 d256"]
    arguments = row.make(InputMaker(torch.float32))
    for name in ("flash-maxsim, two calls", "late-interaction-kernels, two calls"):
        if wrong:
            with pytest.raises(ValueError, match="it computes something else"):
                row.peers[name].prepare(**arguments)
        else:
            call, inputs = row.peers[name].prepare(**arguments)
            torch.testing.assert_close(call(), vk.late_interaction_loss(**arguments))
            assert [t.shape for t in inputs] == [arguments[n].shape for n in ("image_tokens", "text_tokens", "logit_scale")]


MEMORY = """
import resource, sys, torch
import vlkernels as vk
from vlkernels.ops.late_interaction_loss import tiles
torch.set_num_threads(1)
pairs, queries, width = 1024, 32, 16
layouts = {"image_layout": vk.SegmentLayout([[queries]] * pairs), "text_layout": vk.SegmentLayout([[1]] * pairs)}
images, texts = torch.randn(pairs * queries, width, requires_grad=True), torch.randn(pairs, width, requires_grad=True)
def peak():
    vk.late_interaction_loss(images, texts, 10.0, similarity="max", impl="torch", **layouts)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kept, tiles.KEPT_BYTES = tiles.KEPT_BYTES, 0
without = peak()
tiles.KEPT_BYTES = kept
print(peak() - without)
"""


def test_tiles_that_are_kept_leave_no_holes_in_the_heap():
    """Beside a call that keeps none, the peak of resident memory grows by what is kept, 6 MiB here, and little more."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(vk.__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 12 * 1024


MUTANTS = {
    "the last of equal maxima": (torch_kernels, "products.view(*own.shape, *other.shape).max(3)",
                                 "_last_max(products.view(*own.shape, *other.shape))"),
    "padding that counts": (torch_kernels, ").reciprocal(), 0)", ").reciprocal(), 0.1)"),
    "padding that is another's token": (
        torch_kernels, "rows = samples.starts[chosen, None] + torch.minimum(position, lengths[:, None] - 1)",
        "rows = (samples.starts[chosen, None] + position).clamp(max=len(samples.tokens) - 1)"),
    "a tile that is left out": (torch_kernels, "return product(*(_cut(side, self._dtype)",
                                "return product(*(list(_cut(side, self._dtype))[side is texts :]"),
    "a direction without its gather": (torch_kernels, "return gathered + _owned_sum(", "return 0 * gathered + _owned_sum("),
    "a direction without its scatter": (torch_kernels, "return gathered + _owned_sum(", "return gathered + 0 * _owned_sum("),
    "owners that share entries": (torch_kernels, "firsts += entries *", "firsts += 0 *"),
    "weights in another order than their rows": (torch_kernels, "per_sample_weights=weights.gather(1, order)",
                                                 "per_sample_weights=weights"),
    "targets of the other side": (tiles, "by_texts -= self._targets.between(j.samples, i.samples, self._scale)",
                                  "by_texts -= self._targets.between(i.samples, j.samples, self._scale).T.flip(0)"),
    "scales of the other visit": (tiles, "of_texts.add(j.samples, self._scale *", "of_texts.add(j.samples, 2 * self._scale *"),
    "parts upside down": (tiles, ".copy_(part)", ".copy_(part.flip(0))"),
    "statistics of the first tile": (driver, "shrunk = self.total[samples] *", "shrunk = 0 * self.total[samples] *"),
    "sums that do not shrink": (driver, " * (self.largest[samples] - largest).exp_()", ""),
    "smoothing over the wrong number": (driver, "self.label_smoothing / self.total", "self.label_smoothing / (self.total - 1)"),
}  # fmt: skip
LAST_MAX = """
def _last_max(x):
    best, places = x.flip(3).max(3)
    return best, x.shape[3] - 1 - places
"""


def mutant(module, before, after, monkeypatch):
    """The op of impl "torch" with one wrong line in one of its modules."""
    source = Path(module.__file__).read_text()
    assert before in source, f"{module.__name__} no longer reads {before!r}: renew the mutant"
    wrong = types.ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", wrong)
    exec(source.replace(before, after) + LAST_MAX, wrong.__dict__)
    wrong.TILE, wrong.KEPT_BYTES = 12, 1500
    if module is driver:
        return partial(wrong.late_interaction_loss, torch_kernels._tiles)
    if module is tiles:
        monkeypatch.setattr(torch_kernels, "Tiles", wrong.Tiles)
        return torch_kernels.late_interaction_loss
    return wrong.late_interaction_loss


def is_right(op):
    integers = inputs(dtype=torch.float64, width=2, logit_scale=torch.tensor(0.5, dtype=torch.float64))
    for name in ("image_tokens", "text_tokens"):
        integers[name] = integers[name].detach().round().clamp(-1, 1).requires_grad_()
    for arguments in (inputs("mean_max"), inputs("max"), integers):
        found = op(*raw_arguments(arguments))
        tensors = [arguments[name].requires_grad_() for name in ("image_tokens", "text_tokens", "logit_scale")]
        loss = vk.late_interaction_loss(**arguments, impl="reference")
        expected = (loss, *torch.autograd.grad(loss, tensors))
        if not all(torch.allclose(f, e, rtol=1e-9, atol=1e-11) for f, e in zip(found, expected, strict=True)):
            return False
    return True


@pytest.mark.parametrize("module", (torch_kernels, tiles, driver))
def test_the_op_is_right_as_it_is(module, monkeypatch, small_tiles):
    assert is_right(mutant(module, "", "", monkeypatch))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_shows(name, monkeypatch, small_tiles):
    assert not is_right(mutant(*MUTANTS[name], monkeypatch))
