"""The model of roles: segments and mask tables of the joint stream, what a decoder reads, what is shared, passes and
their draws."""

import dataclasses

import numpy as np
import pytest
import torch
import vlkernels as vk

from engine.batch import Batch, MaskedRegions, MaskedWords, Patches, Places, Regions, Text
from engine.models.masks import mask_table
from engine.models.model import VisionLanguageModel
from engine.sections import (
    DecoderStack,
    FusionStack,
    GeneratorStack,
    ImageInput,
    ImageStack,
    JointStack,
    Model,
    TextStack,
)
from engine.sections import Regions as RegionOptions

VOCAB, SIDE = 40, 3
SIZES = {"width": 24, "layers": 2, "heads": 2, "mlp_width": 32}
POST = SIZES | {"norm": "post"}
TEXT_LENGTHS, TARGET_LENGTHS = [4, 2, 6], [3, 5, 2]
PATCHES = {"patch_size": 2, "max_grid": (SIDE, SIDE), "positions": "learned"}
IMAGE = ImageStack(**SIZES, **PATCHES, class_token=True)


def make(dropout: float = 0.0, **roles) -> VisionLanguageModel:
    """Redrawn, in evaluation mode unless it drops."""
    given = {name: None for name in ("image", "text", "fusion")} | roles
    for name, role in given.items():
        if role is not None and dropout:
            given[name] = dataclasses.replace(role, dropout=dropout, attention_dropout=dropout)
    model = VisionLanguageModel(Model(**given, projection_dim=16), VOCAB, RegionOptions(feature_values=10)).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.25 if parameter.dim() >= 2 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return model.train(dropout > 0)


def text_of(lengths: list[int], seed: int = 0) -> Text:
    random = np.random.default_rng(seed)
    return Text(torch.from_numpy(random.integers(4, VOCAB, sum(lengths))), vk.SegmentLayout([[n] for n in lengths]))


def batch(*, text: bool = True, image: str | None = "patches") -> Batch:
    """Three samples; a view with hidden words, one with a text of its own, and with regions one that hides some."""
    count, random = len(TEXT_LENGTHS), np.random.default_rng(1)
    tokens = {"patches": [SIDE**2] * count, "regions": [3, 1, 4], None: [0] * count}[image]
    words = TEXT_LENGTHS if text else [0] * count
    made, total = text_of(TEXT_LENGTHS) if text else None, sum(tokens)
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).repeat(count, 1).int()
    pictures = {
        "patches": lambda: Patches(torch.from_numpy(random.standard_normal((total, 12))), places),
        "regions": lambda: Regions(torch.from_numpy(random.random((total, 10))), torch.from_numpy(random.random((total, 7)))),
        None: lambda: None,
    }[image]()
    views = {"target": text_of(TARGET_LENGTHS, seed=3)}
    if text:
        hidden = made.ids.clone()
        hidden[[1, 7]] = 3
        views["words"] = MaskedWords(hidden, Places(torch.tensor([0, 2]), torch.tensor([1, 1])), made.ids[[1, 7]])
    if image == "regions":
        views["regions"] = MaskedRegions(Places(torch.tensor([0, 2]), torch.tensor([2, 3])))
    layout = vk.SegmentLayout(list(zip(words, tokens, strict=True)))
    return Batch(layout, made, pictures, torch.arange(count), torch.arange(count, dtype=torch.int32), views)


def changed(one: Batch, index: int) -> Batch:
    """The same batch but for one word."""
    ids = one.text.ids.clone()
    ids[index] = (ids[index] + 1) % VOCAB
    return dataclasses.replace(one, text=dataclasses.replace(one.text, ids=ids))


def differing(a: torch.Tensor, b: torch.Tensor) -> list[int]:
    return ((a - b).abs().amax(1) > 1e-9).nonzero().flatten().tolist()


# ---- mask tables


@pytest.mark.parametrize(
    "kind, segments, drawn",
    [
        ("causal", ["text"], ["◣"]),
        ("causal", ["text", "image"], ["◣ █", "· ◣"]),
        ("causal", ["prefix", "prefix", "text"], ["◣ · ·", "█ ◣ ·", "█ █ ◣"]),
        ("prefix", ["queries", "text"], ["█ ·", "█ ◣"]),
        ("prefix", ["text", "image", "image"], ["◣ █ █", "· █ █", "· █ █"]),
        ("separate", ["queries", "text", "image", "image"], ["█ · · ·", "· █ · ·", "· · █ █", "· · █ █"]),
    ],
)
def test_tables(kind, segments, drawn):
    assert str(mask_table(kind, segments)) == "\n".join(drawn)


def test_all_see_all_without_a_table():
    assert mask_table("full", ["text", "image"]) is None


# ---- the joint stream

JOINT = {
    "uniter": JointStack(**POST, types=2, image=ImageInput(kind="regions", type_of_text=1)),
    "vilt": JointStack(**SIZES, types=2, kinds=True, image=ImageInput(**PATCHES, class_token=True, embedding_norm=False)),
    "queries": JointStack(**POST, queries=4, image=ImageInput(**PATCHES, class_token=True)),
}


def joint(name: str, dropout: float = 0.0, **options) -> tuple[VisionLanguageModel, Batch]:
    stack = dataclasses.replace(JOINT[name], **options)
    return make(dropout, joint=stack), batch(image="regions" if name == "uniter" else "patches")


@pytest.mark.parametrize(
    "name, segments, lengths",
    [
        ("uniter", ["text", "image"], [[4, 3], [2, 1], [6, 4]]),
        ("vilt", ["text", "image", "image"], [[4, 1, 9], [2, 1, 9], [6, 1, 9]]),
        ("queries", ["queries", "text", "image", "image"], [[4, 4, 1, 9], [4, 2, 1, 9], [4, 6, 1, 9]]),
    ],
)
def test_segments_of_a_joint_stream(name, segments, lengths):
    model, one = joint(name)
    read = model.joint_states(one)
    assert model.joint.segments == segments and read.layout.lengths.tolist() == lengths
    assert model.joint.segment("image") == len(segments) - 1 and model.joint.segment("text") == segments.index("text")
    assert read.hidden.shape == (sum(map(sum, lengths)), 24) and model.pooled(read).shape == (3, 24)


@pytest.mark.parametrize("name", JOINT)
def test_a_sample_is_read_alone(name):
    model, one = joint(name)
    other = model.joint_states(changed(one, 4))
    read = model.joint_states(one)
    own = read.layout.token_sample() == 1
    assert differing(read.hidden, other.hidden) == own.nonzero().flatten().tolist()


@pytest.mark.parametrize("mask, sees_text", [("prefix", ["text"]), ("separate", ["text"]), ("full", ["queries", "text", "image"])])
def test_who_sees_the_text(mask, sees_text):
    """The last word of sample 0 is changed: who notices under each table, and who under one that is asked for."""
    model, one = joint("queries")
    segment = model.joint_states(one).layout.token_segment()
    names = np.array(model.joint.segments)[segment]
    read, other = (model.joint_states(b, mask=mask).hidden for b in (one, changed(one, 3)))
    noticed = differing(read, other)
    assert sorted(set(names[noticed])) == sorted(sees_text)
    if mask == "prefix":
        assert noticed == [7], "its past does not see it"
    default, _ = joint("queries", mask=mask)
    torch.testing.assert_close(default.joint_states(one).hidden, read)


@pytest.mark.parametrize("name", ["uniter", "vilt", "queries"])
@pytest.mark.parametrize("lacking", ["text", "image"])
def test_a_batch_may_lack_text_or_image(name, lacking):
    model, _ = joint(name)
    kind = "regions" if name == "uniter" else "patches"
    one = batch(text=lacking != "text", image=None if lacking == "image" else kind)
    read = model.joint_states(one)
    lacked = [s for s, segment in enumerate(model.joint.segments) if segment == lacking]
    assert read.layout.lengths[:, lacked].sum() == 0 and len(read.hidden) == int(read.layout.lengths.sum())
    assert read.hidden.isfinite().all()


def test_kinds_are_added_behind_the_norms():
    model, one = joint("vilt")
    before = model.joint_states(one).hidden
    with torch.no_grad():
        model.joint.kinds[1] += torch.randn(24)
    assert differing(before, model.joint_states(one).hidden)


def test_queries_read_the_image_tower_and_words_do_not():
    """Q-Former: under separate tables a picture changes the queries alone, and through them, where seen, the text."""
    stack = JointStack(**POST, queries=4, source="image", cross_every=2, own_feed_forward=True)
    model, one = make(image=IMAGE, joint=stack), batch()
    image = dataclasses.replace(one.image, values=one.image.values + 1)
    other = dataclasses.replace(one, image=image)
    layout = model.joint_states(one).layout
    assert layout.lengths.tolist() == [[4, 4], [4, 2], [4, 6]]
    queries = (layout.token_segment() == 0).nonzero().flatten().tolist()
    read = [differing(*(model.joint_states(b, mask=mask).hidden for b in (one, other))) for mask in ("separate", "full")]
    assert read == [queries, list(range(layout.num_tokens))]
    crosses = [block.cross_attention is not None for block in model.joint.transformer.blocks]
    assert crosses == [True, False]


def test_queries_without_a_text():
    stack = JointStack(**POST, queries=4, text=False, source="image", pooling="first")
    model = make(image=IMAGE, joint=stack)
    assert model.joint_states(batch()).layout.lengths.tolist() == [[4]] * 3
    assert model.joint.text is None and model.joint.queries_norm is not None


# ---- what is asked for is the same, and costs no other rows

FUSING = {"image": IMAGE, "text": TextStack(**SIZES), "fusion": FusionStack(**SIZES)}
MASKED = {
    "text": ({"text": TextStack(**POST)}, "words", "text_states", 0),
    "causal text": ({"text": TextStack(**SIZES, mask="causal")}, "words", "text_states", 0),
    "fusion": (FUSING, "words", "fused_states", 0),
    "from ids": (FUSING | {"fusion": FusionStack(**SIZES, begins_with="ids")}, "words", "fused_states", 0),
    "joint words": ({"joint": JOINT["uniter"]}, "words", "joint_states", 0),
    "joint regions": ({"joint": JOINT["uniter"]}, "regions", "joint_states", 1),
    "queries": ({"joint": JOINT["queries"]}, "words", "joint_states", 1),
}


@pytest.mark.parametrize("case", MASKED)
def test_masked_states_are_those_of_the_whole_pass(case):
    roles, view, whole, segment = MASKED[case]
    model = make(**roles)
    one = batch(image="regions" if "joint" in case else "patches")
    read = getattr(model, whole)(one, view)
    rows = one.views[view].places.rows(read.layout, segment)
    torch.testing.assert_close(model.masked_states(one, view), read.hidden[rows], rtol=1e-9, atol=1e-9)
    plain = getattr(model, whole)(one)
    assert differing(plain.hidden[rows], read.hidden[rows]) == [0, 1], "the view is what is read"


# ---- the decoder

SOURCES = {
    "text": {"text": TextStack(**SIZES)},
    "image": {"image": IMAGE},
    "fusion": FUSING,
    "joint": {"joint": JOINT["queries"]},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("reads", ["attention", "prefix"])
def test_a_decoder_reads_a_role_and_its_own_past(source, reads):
    model, one = make(**SOURCES[source], decoder=DecoderStack(**SIZES, source=source, reads=reads)), batch()
    read = model.decoder_states(one, "target")
    text = read.layout.num_segments - 1
    assert read.layout.lengths[:, text].tolist() == TARGET_LENGTHS
    own = read.layout.token_segment() == text
    ids = one.views["target"].ids.clone()
    ids[1] = (ids[1] + 1) % VOCAB
    other = dataclasses.replace(one, views=one.views | {"target": dataclasses.replace(one.views["target"], ids=ids)})
    expected = own.nonzero().flatten()[1:3].tolist()
    assert differing(read.hidden, model.decoder_states(other, "target").hidden) == expected
    if source != "image":
        sample = (read.layout.token_sample() == 0) & own
        noticed = differing(read.hidden[own], model.decoder_states(changed(one, 0), "target").hidden[own])
        assert noticed == [0, 1, 2] and int(sample.sum()) == 3
    one.views["again"] = one.views["words"]
    if source in ("text", "fusion"):
        assert differing(read.hidden, model.decoder_states(one, "target", source_view="again").hidden)


@pytest.mark.parametrize("mask, noticed", [("causal", 2), ("full", 4)])
def test_tokens_of_a_prefix(mask, noticed):
    """How many of the prefix's own rows a change of the third word of sample 0 reaches."""
    decoder = DecoderStack(**SIZES, source="text", reads="prefix", prefix_mask=mask)
    model, one = make(text=TextStack(**SIZES, mask="causal"), decoder=decoder), batch()
    read, other = model.decoder_states(one, "target"), model.decoder_states(changed(one, 2), "target")
    prefix = read.layout.token_segment() == 0
    assert len(differing(read.hidden[prefix], other.hidden[prefix])) == noticed


def test_a_decoder_alone_is_a_causal_text():
    model, one = make(decoder=DecoderStack(**SIZES)), batch(image=None)
    read = model.decoder_states(one).hidden
    assert differing(read, model.decoder_states(changed(one, 1)).hidden) == [1, 2, 3]
    assert model.words is model.decoder.embedder.words and model.last_role == "decoder"


# ---- sharing


def blip(dropout: float = 0.0) -> VisionLanguageModel:
    return make(
        dropout,
        **FUSING | {"fusion": FusionStack(**SIZES, begins_with="ids")},
        decoder=DecoderStack(**SIZES, source="image", shares="all_but_attention"),
    )


def test_blips_roles_share():
    model = blip()
    for own, fused, written in zip(*(r.transformer.blocks for r in (model.text, model.fusion, model.decoder)), strict=True):
        assert own.self_attention is fused.self_attention and own.self_attention is not written.self_attention
        assert own.feed_forward is fused.feed_forward is written.feed_forward
        assert fused.cross_attention is written.cross_attention and own.cross_attention is None
    assert model.decoder.embedder is model.text.embedder
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) and not any(name.startswith("decoder.embedder") for name in names)


def test_a_step_through_shared_roles_trains_them_all():
    model, one = blip(), batch()
    sum(s.hidden.sum() for s in (model.text_states(one), model.fused_states(one), model.decoder_states(one, "target"))).backward()
    untouched = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert untouched == {"logit_scale", "image_head.projection.weight", "text_head.projection.weight"} | {
        name for name in untouched if ".final_norm." in name and "text" not in name
    }


def test_a_decoder_has_the_words_of_the_joint_stream_where_there_is_no_text_role():
    model = make(joint=JOINT["uniter"], decoder=DecoderStack(**SIZES, source="joint", shares="words"))
    assert model.decoder.embedder.words is model.joint.text.words is model.words_of("decoder")


def test_electras_generator_reads_with_the_texts_tables():
    sizes = SIZES | {"width": 12, "mlp_width": 16}
    generator = GeneratorStack(**sizes | {"layers": 1}, embedding_width=24)
    model = make(text=TextStack(**SIZES, embedding_width=24), generator=generator)
    assert model.generator.embedder is model.text.embedder
    assert model.generator_states(batch(image=None)).hidden.shape == (12, 12)


# ---- passes and their draws


def count_calls(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_every_pass_runs_once():
    model, one = blip(), batch()
    counts = [count_calls(role) for role in (model.image, model.text, model.fusion, model.decoder)]
    keys_values = count_calls(model.fusion.transformer.blocks[0].cross_attention.key_value)
    with model.passes_shared():
        for _ in range(2):
            model.text_states(one)
            model.fused_states(one)
            model.masked_states(one, "words")
            model.decoder_states(one, "target")
            model.image_features(one)
    assert [len(calls) for calls in counts] == [1, 1, 2, 1] and len(keys_values) == 2, "for fusion and for the decoder"
    model.image_states(one)
    assert len(counts[0]) == 2 and model._passes is None, "nothing is kept outside"


def test_passes_draw_differently():
    """The same words through the same layers: over a view, and in roles that share their blocks."""
    model, one = blip(dropout=0.3), batch()
    one.views["again"] = dataclasses.replace(one.text)
    one.views["words"].ids = one.text.ids
    passes = {
        "text": model.text_states(one),
        "view": model.text_states(one, "again"),
        "other view": model.text_states(one, "words"),
        "fusion": model.before_fusion(one),
    }
    embedded = model.text.embed(one.text, passes["text"].layout, model.rng).hidden
    hidden = [tokens.hidden for tokens in passes.values()]
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(hidden) for b in hidden[:i])
    assert ((embedded == 0) != (passes["fusion"].hidden == 0)).any()
    again = model.text_states(one).hidden
    assert torch.equal(again, passes["text"].hidden)
    model.rng.advance()
    assert (model.text_states(one).hidden - again).abs().max() > 1e-2


def test_call_sites_have_their_own_streams():
    model = make(**FUSING, joint=JOINT["queries"], decoder=DecoderStack(**SIZES, source="text"))
    streams = []
    for module in model.modules():
        streams += [value for name, value in vars(module).items() if name.endswith("stream")]
        streams += getattr(module, "streams", [])
    assert len(streams) == len(set(streams)) > 30


# ---- sections


@pytest.mark.parametrize(
    "roles, message",
    [
        ({}, "model: at least one role must be given"),
        ({"fusion": FusionStack()}, "model.fusion needs model.image and model.text, which is null"),
        (FUSING | {"fusion": FusionStack(width=64)}, "model.fusion.width must be model.text.width = 24, .* got 64"),
        (
            FUSING | {"fusion": FusionStack(**SIZES | {"layers": 3}, begins_with="ids")},
            "model.fusion.layers must be 2, got 3",
        ),
        ({"decoder": DecoderStack(source="joint")}, "model.decoder.source needs model.joint, which is null"),
        ({"decoder": DecoderStack(shares="words")}, "model.decoder.shares needs model.text, which is null"),
        (
            {"joint": JOINT["uniter"], "decoder": DecoderStack(**SIZES, shares="all_but_attention")},
            "model.decoder.shares needs model.text, which is null",
        ),
        (
            {"joint": JOINT["uniter"], "decoder": DecoderStack(shares="words")},
            "tables of one width: those of model.joint have 24, its own 128",
        ),
        (
            {"text": TextStack(**SIZES), "decoder": DecoderStack(shares="words")},
            "tables of one width: those of model.text have 24, its own 128",
        ),
        ({"joint": JointStack(source="image")}, "model.joint.source needs model.image, which is null"),
        (
            {"text": TextStack(**SIZES), "generator": GeneratorStack()},
            "model.generator.shares embedder needs tables of one width: those of model.text have 24, its own 128",
        ),
    ],
)
def test_roles_that_do_not_fit(roles, message):
    with pytest.raises(ValueError, match=message):
        Model(**{name: None for name in ("image", "text", "fusion")} | roles)


@pytest.mark.parametrize(
    "make_section, message",
    [
        (lambda: JointStack(text=False), "model.joint must have text, image or queries"),
        (lambda: JointStack(own_feed_forward=True), "model.joint.own_feed_forward is for queries and text"),
        (lambda: JointStack(image=ImageInput(type_of_text=1)), "a row of model.joint.types = 0, got 1"),
        (lambda: JointStack(image=ImageInput(patch_size=0)), "model.joint.image.patch_size must be positive, got 0"),
        (lambda: JointStack(embedding_width=8), "model.joint.embedding_width must be null"),
        (lambda: ImageStack(positions="text"), "model.image.positions text needs the text beside it"),
        (lambda: FusionStack(cross_from=-1), "model.fusion.cross_from must not be negative, got -1"),
    ],
)
def test_sections_that_do_not_fit(make_section, message):
    with pytest.raises(ValueError, match=message):
        make_section()
