"""One stream of words and regions: embedding by hand, in one call; batches that lack a modality; dropout;
sizes."""

import pytest
import torch
from random_pairs import (
    FOUR,
    SIZES,
    TASKS,
    UNITER,
    VIEWS,
    one_stream,
    packed,
    random_pairs,
    region_batch,
    small_one_stream,
    small_stack,
)
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plain_uniter import Sizes
from benchmarks.uniter_pairs import Pair
from engine.batch import IMAGE, TEXT, Batch
from engine.build import build_model
from engine.models import VisionLanguageModel
from engine.models.views import text_of
from engine.objectives import Objectives, PretrainingModule, add_heads
from engine.objectives.random_matching import RandomMatching
from engine.sections import JointStack, Regions
from engine.training.command_line import parse
from vlkernels.core import native

REGIONS = Regions(SIZES.feature_values, SIZES.classes)


def without(pair: Pair, segment: int) -> Pair:
    """The pair without its caption, or without its regions."""
    fields = dict(vars(pair))
    names = ("text_ids", "masked_ids", "word_targets") if segment == TEXT else (
        "features", "boxes", "region_masked", "soft_labels",
    )  # fmt: skip
    return Pair(**fields | {name: fields[name][:0] for name in names})


# ---- embedding


@pytest.mark.parametrize("masked", [None, TEXT, IMAGE])
def test_embedding_by_hand(masked):
    model, batch = small_one_stream(dtype=torch.float64), region_batch(range(4))
    text, regions, width = model.joint.text, model.joint.image, SIZES.stack.width
    words, positions, types = text.words, text.positions, text.types

    def norm(x, module):
        return F.layer_norm(x, (width,), module.weight, module.bias, 1e-12)

    ids = batch.views["masked_language"].ids if masked == TEXT else batch.text.ids
    features = batch.image.features.double()
    if masked == IMAGE:
        features[batch.views["masked_region_features"].places.rows(batch.image_layout)] = regions.mask_row
    features = norm(regions.feature_projection(features), regions.feature_norm)
    boxes = norm(regions.box_projection(batch.image.boxes.double()), regions.box_norm)
    position = torch.cat([torch.arange(length) for length in batch.layout.lengths[:, TEXT]])
    of_text = norm(words[ids] + positions[position] + types[0], text.norm)
    of_regions = norm(features + boxes + types[1], regions.norm)
    parts = zip(
        of_text.split(batch.layout.lengths[:, TEXT].tolist()),
        of_regions.split(batch.layout.lengths[:, IMAGE].tolist()),
        strict=True,
    )
    expected = torch.cat([rows for pair in parts for rows in pair])
    torch.testing.assert_close(embedded(model, batch, masked), expected, rtol=1e-10, atol=1e-10)


def embedded(model: VisionLanguageModel, batch: Batch, masked: int | None) -> torch.Tensor:
    view = VIEWS[masked]
    hidden = batch.views[view].places.rows(batch.image_layout) if masked == IMAGE else None
    text = text_of(batch, view)
    return model.joint.embed(text, batch.image, batch.layout, model.rng, batch.image_layout, hidden).hidden


class RowsMade(TorchDispatchMode):
    """Names of the operators whose result holds floating rows for every token of the stream."""

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens, self.names = num_tokens, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor) and result.is_floating_point() and result.dim() == 2:
                self.names += [function.name()] * (len(result) >= self.num_tokens)
        return results


@pytest.mark.skipif(native.load() is not None, reason="the compiled library is not built")
def test_rows_are_embedded_straight_into_the_stream():
    """One call makes all rows of the stream, in packed order: nothing gathers, joins or moves them."""
    model, batch = small_one_stream(dropout=0.1), region_batch(range(5))
    with torch.no_grad(), RowsMade(batch.layout.num_tokens) as made:
        hidden = embedded(model, batch, IMAGE)
    assert hidden.shape == (batch.layout.num_tokens, SIZES.stack.width)
    assert made.names == ["vlkernels::embed_layer_norm_forward"]
    with RowsMade(batch.layout.num_tokens) as made:
        torch.cat((hidden[:1], hidden[1:]))
    assert made.names == ["aten::cat"], "the test would see rows that are joined"


# ---- batches that lack something


@pytest.mark.parametrize("segment", [TEXT, IMAGE])
def test_pairs_may_lack_a_modality(segment):
    """Beside other pairs, and throughout the batch, what is left is read as if it were alone."""
    model = small_one_stream(dtype=torch.float64)
    whole = random_pairs(range(4))
    some = [whole[0], without(whole[1], segment), whole[2], without(whole[3], segment)]
    batch = packed(some)
    hidden = model.joint_states(batch).hidden.split(batch.layout.lengths.sum(1).tolist())
    lacking = packed([some[1], some[3]])
    assert lacking.layout.segment_totals[segment] == 0
    together = model.joint_states(lacking)
    torch.testing.assert_close(together.hidden, torch.cat((hidden[1], hidden[3])), rtol=1e-10, atol=1e-10)
    alone = model.joint_states(packed(some[:1])).hidden
    torch.testing.assert_close(alone, hidden[0], rtol=1e-10, atol=1e-10)
    pooled = torch.tanh(model.joint.pooling.dense(together.hidden[together.layout.cu_seqlens[:-1]]))
    torch.testing.assert_close(model.pooled(together), pooled, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("segment", [TEXT, IMAGE])
def test_every_task_runs_where_all_pairs_lack_a_modality(segment):
    """All modules of a task run, as ZeRO-3 needs: other ranks may have what is missing here."""
    model = small_one_stream()
    batch = packed([without(pair, segment) for pair in random_pairs(range(3))])
    module = PretrainingModule(model, FOUR.active)
    for task in TASKS:
        whole, lacking = (modules_run(module, b, task) for b in (region_batch(range(3)), batch))
        assert whole == lacking
        batch.task = (task,)
        total, losses, _ = module(batch)
        total.backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def modules_run(module: nn.Module, batch, task: str) -> list[str]:
    run: list[str] = []
    hooks = [
        part.register_forward_hook(lambda *_, name=name: run.append(name))
        for name, part in module.named_modules()
    ]
    batch.task = (task,)
    module(batch)
    for hook in hooks:
        hook.remove()
    return run


# ---- objectives


@pytest.mark.parametrize("task", TASKS)
def test_eight_pairs_are_learned_by_heart(task):
    torch.manual_seed(1)
    model = one_stream(small_stack(), SIZES.vocab_size, REGIONS, initializer_range=0.1)
    add_heads(model, FOUR.active)
    batch = region_batch(range(8))
    module = PretrainingModule(model, FOUR.active)
    batch.task = (task,)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    values = []
    for _ in range(60):
        total, losses, _ = module(batch)
        assert task in losses and set(losses) <= {task, "word_region_alignment"}
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(losses[task].item())
    assert values[-1] < 0.03 * values[0]


def test_weights_act_on_the_losses_of_their_task():
    weighted = Objectives(masked_language=FOUR.masked_language, random_matching=RandomMatching(weight=3.0))
    module = PretrainingModule(small_one_stream(), weighted.active)
    batch = region_batch(range(4))
    batch.task = ("random_matching",)
    total, losses, _ = module(batch)
    assert losses.keys() == {"random_matching", "word_region_alignment"}
    torch.testing.assert_close(total, 3 * (losses["random_matching"] + losses["word_region_alignment"]))
    batch.task = None
    assert module(batch)[1].keys() == {"masked_language", "random_matching", "word_region_alignment"}


# ---- dropout, recomputation


def test_dropout_belongs_to_the_pair():
    """The same pair in another place of another batch draws the same masks; another step draws others."""
    model = small_one_stream(dropout=0.3)
    first, second = region_batch(range(6)), region_batch((4, 2))
    lengths = first.layout.lengths.sum(1).tolist()

    def read(batch) -> torch.Tensor:
        return model.joint_states(batch, VIEWS[IMAGE]).hidden

    here = read(first).split(lengths)
    torch.testing.assert_close(torch.cat((here[4], here[2])), read(second), rtol=1e-4, atol=1e-5)
    model.eval()
    assert (read(first) - torch.cat(here)).abs().max() > 1e-2
    model.train()
    model.rng.advance()
    assert (read(first) - torch.cat(here)).abs().max() > 1e-2


@pytest.mark.parametrize("task", TASKS)
def test_checkpointing_changes_no_bit(task):
    gradients = []
    for recompute in (False, True):
        model, batch = small_one_stream(dropout=0.2), region_batch(range(6))
        model.checkpoint_activations(recompute)
        batch.task = (task,)
        PretrainingModule(model, FOUR.active)(batch)[0].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_blocks_compile_whole_and_once():
    """For any number of tokens, without a graph break."""
    eager, compiled = small_one_stream(), small_one_stream()
    graphs = CompileCounter()
    for block in compiled.joint.transformer.blocks:
        block.forward = torch.compile(block.forward, backend=graphs, dynamic=True, fullgraph=True)
    for numbers in (range(6), range(3), range(9)):
        batch = region_batch(numbers)
        torch.testing.assert_close(compiled.joint_states(batch).hidden, eager.joint_states(batch).hidden)
    assert graphs.frame_count == SIZES.stack.layers


def test_rng_moves_with_the_model():
    assert small_one_stream().to("meta").rng.state.device.type == "meta"


# ---- sizes and first weights


def published_parameters(vocab: int, positions: int, d: int, layers: int, features: int, classes: int) -> int:
    """Tensors of the released checkpoints, tied ones once: those of BERT with its pooler and MLM head, the
    region embedder (`img_linear`, `pos_linear`, three norms, `mask_embedding` of two rows), `feat_regress`,
    `region_classifier` and `itm_output`."""
    linear, norm = lambda inputs, outputs: inputs * outputs + outputs, 2 * d
    text = (vocab + positions + 2) * d + norm
    regions = linear(features, d) + norm + linear(7, d) + norm + 2 * features + norm
    layer = 4 * linear(d, d) + norm + linear(d, 4 * d) + linear(4 * d, d) + norm
    transform = linear(d, d) + norm
    heads = (transform + vocab) + (transform + features) + (transform + linear(d, classes)) + linear(d, 2)
    return text + regions + layers * layer + linear(d, d) + heads


@pytest.mark.parametrize(
    ("recipe", "width", "layers", "transformer", "published"),
    [
        ("uniter_base", 768, 12, 85_054_464, 112_938_887),
        ("uniter_large", 1024, 24, 302_309_376, 340_524_935),
    ],
)
def test_parameter_counts_are_the_published_ones(recipe, width, layers, transformer, published):
    """All but the row of `mask_embedding` for regions that are not masked: zeros that are set again in each
    forward and never trained. The model here has no such row."""
    with torch.device("meta"):
        model = build_model(parse([f"--config=engine/recipes/{recipe}.yaml"]), 28_996)
    assert published_parameters(28_996, 512, width, layers, 2048, 1601) == published
    assert sum(p.numel() for p in model.parameters()) == published - 2048
    assert sum(p.numel() for p in model.joint.transformer.parameters()) == transformer
    assert not dict(model.named_buffers())


def test_first_weights_are_berts():
    torch.manual_seed(0)
    model = one_stream(JointStack(max_positions=64, **UNITER), 300, REGIONS)
    add_heads(model, FOUR.active)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            spread = 0.4 if parameter.numel() < 1000 else 0.1
            assert parameter.std().item() == pytest.approx(0.02, rel=spread), name
        elif name.endswith("bias"):
            assert not parameter.any(), name


def test_the_recipe_chooses_the_model():
    config = parse(["--config=engine/recipes/uniter_base.yaml", "--tiny=true"])
    model = build_model(config, 512)
    assert model.image is None and len(model.joint.transformer.blocks) == 2
    assert model.joint.image.feature_projection.weight.shape == (32, 2048)
    assert set(config.objectives.active) == set(TASKS)
    assert Sizes().classes == model.heads["masked_region_classes"].classifier.out_features
