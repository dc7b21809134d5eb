"""ALBEF's losses against plain, padded PyTorch with a momentum copy of other weights: values and every gradient."""

import pytest
import torch
from random_batch import VOCAB, random_batch, small_config, small_model
from torch.nn import functional as F

from benchmarks.plain_quickstart import PaddedPairs, PlainModel, pick
from engine.build import build_model
from engine.models.momentum import FeatureQueue
from engine.objectives import Objectives, PretrainingModule, add_heads, matching
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.matching import Matching
from engine.objectives.momentum_contrastive import MomentumContrastive
from engine.objectives.parts.momentum import risen
from engine.training.command_line import parse

PAIRS, QUEUE, SHARE, RAMP, PROGRESS = 7, 21, 0.4, 0.1, 0.075
NOW = SHARE * PROGRESS / RAMP
HARD_TEXTS, HARD_IMAGES = torch.tensor([1, 2, 0, 0, 6, 4, 2]), torch.tensor([3, 0, 1, 6, 0, 1, 0])
TAUGHT = {"distillation": SHARE, "ramp": RAMP}
ALBEF = Objectives(
    momentum_contrastive=MomentumContrastive(queue=QUEUE, **TAUGHT),
    matching=Matching(negatives="local"),
    masked_language=MaskedLanguage(**TAUGHT),
)


def redraw(module: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() >= 2 else 0.4))


def albef():
    """A model with heads, and a momentum copy that has gone another way."""
    model = small_model(dtype=torch.float64)
    add_heads(model, ALBEF.active)
    model.add_teacher({part for objective in ALBEF.active.values() for part in objective.taught_by})
    redraw(model.teacher, 5)
    return model.double()


def plain(state: dict[str, torch.Tensor]) -> PlainModel:
    """What the state lacks is not read."""
    module = PlainModel(small_config(), VOCAB).double()
    known = module.state_dict().keys()
    module.load_state_dict({name: value for name, value in state.items() if name in known}, strict=False)
    return module


def read(module: PlainModel, pairs: PaddedPairs):
    """States of pictures and of texts, and the features of both."""
    image = module.image.transformer(module.image.embedder(pairs.rows, pairs.columns, pairs.patches), pairs.see_patches)
    text = module.encode_text(pairs.text_ids, pairs.see_words)
    return image, text, module.image_head(image, pairs.real_patches), module.text_head(text, pairs.real_words)


def masked_words(module: PlainModel, pairs: PaddedPairs, image: torch.Tensor) -> torch.Tensor:
    source = module.fusion["transformer"].project_source(image)
    masked = module.encode_text(pairs.masked_ids, pairs.see_words)
    fused = module.fusion["transformer"](masked, pairs.see_words, source, pairs.see_patches)
    return module.heads["masked_language"](fused[pairs.samples, pairs.offsets], module.text.embedder.words)


def soft_cross_entropy(logits: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    hard = F.one_hot(targets, logits.shape[1]).double()
    wanted = NOW * teacher.softmax(1) + (1 - NOW) * hard
    return -(wanted * logits.log_softmax(1)).sum(1).mean()


def definition(student: PlainModel, copied: PlainModel, pairs: PaddedPairs, queues: dict[str, torch.Tensor]):
    """The three losses, and the features that go to the queues."""
    image, text, of_image, of_text = read(student, pairs)
    scale, own = student.logit_scale.exp(), torch.arange(PAIRS)
    with torch.no_grad():
        their_image, _, image_keys, text_keys = read(copied, pairs)
        words = masked_words(copied, pairs, their_image)
        all_images, all_texts = torch.cat((image_keys, queues["image"])), torch.cat((text_keys, queues["text"]))
        to_text, to_image = scale * image_keys @ all_texts.T, scale * text_keys @ all_images.T
    itc = soft_cross_entropy(scale * of_image @ all_texts.T, to_text, own)
    itc = (itc + soft_cross_entropy(scale * of_text @ all_images.T, to_image, own)) / 2
    texts, images = torch.cat((own, HARD_TEXTS, own)), torch.cat((own, own, HARD_IMAGES))
    fusion = student.fusion["transformer"]
    source = [tuple(part[images] for part in both) for both in fusion.project_source(image)]
    fused = fusion(text[texts], pick(pairs.see_words, texts), source, pick(pairs.see_patches, images))
    itm = F.cross_entropy(student.heads["matching"](fused), (torch.arange(3 * PAIRS) < PAIRS).long())
    mlm = soft_cross_entropy(masked_words(student, pairs, image), words, pairs.targets)
    return {"momentum_contrastive": itc, "matching": itm, "masked_language": mlm}, {"image": image_keys, "text": text_keys}


def test_losses_gradients_and_what_goes_to_the_queues(monkeypatch):
    monkeypatch.setattr(matching, "draw_negatives", lambda *_: (HARD_TEXTS, HARD_IMAGES))
    model = albef()
    queues = {side: queue.features.clone() for side, queue in model.heads["momentum_contrastive"].items()}
    student, copied = plain(model.state_dict()), plain(model.teacher.module.state_dict())
    batch = random_batch(range(PAIRS))
    batch.progress = PROGRESS
    total, losses, _ = PretrainingModule(model, ALBEF.active)(batch)
    total.backward()
    expected, keys = definition(student, copied, PaddedPairs.of(batch), queues)
    sum(expected.values()).backward()
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-10, atol=1e-10)
    theirs = dict(student.named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith("teacher."):
            assert parameter.grad is None and not parameter.requires_grad
            continue
        scale = theirs[name].grad.abs().max()
        assert scale > 1e-9, name
        assert (parameter.grad - theirs[name].grad).abs().max() / scale < 1e-9, name
    for side, queue in model.heads["momentum_contrastive"].items():
        assert torch.equal(queue.features, queues[side])
        queue.after_step(applied=True)
        torch.testing.assert_close(queue.features[:PAIRS], keys[side])
        assert torch.equal(queue.features[PAIRS:], queues[side][PAIRS:])


def test_each_pass_of_the_copy_runs_once(monkeypatch):
    model, runs = albef(), []
    monkeypatch.setattr(type(model.image), "forward", counted(runs, type(model.image).forward))
    PretrainingModule(model, ALBEF.active)(random_batch(range(PAIRS)))
    assert runs.count(model.teacher.module.image) == runs.count(model.image) == 1


def counted(runs, forward):
    def run(self, *inputs, **options):
        runs.append(self)
        return forward(self, *inputs, **options)

    return run


def test_the_copy_has_what_is_read_and_nothing_else():
    model = small_model()
    add_heads(model, ALBEF.active)
    model.add_teacher(set(MomentumContrastive().taught_by))
    kept = {name.split(".")[0] for name, _ in model.teacher.module.named_parameters()}
    assert kept == {"image", "text", "image_head", "text_head"}
    assert model.fusion is not None and model.heads.keys() == ALBEF.active.keys()
    assert small_model().teacher is None


def test_the_share_of_the_copy_rises():
    assert [risen(0.4, 0.1, at) for at in (0.0, 0.05, 0.1, 1.0)] == [0.0, 0.2, 0.4, 0.4]
    assert risen(0.4, 0.0, 0.0) == 0.4


def test_held_out_loss_is_that_of_the_words_alone():
    """However large the copy's share is in training."""
    model, batch = albef().eval(), random_batch(range(PAIRS))
    alone = ALBEF.masked_language.total(model, batch, 0.0)
    model.teacher = None
    torch.testing.assert_close(alone, MaskedLanguage()(model, batch)[0]["masked_language"] * batch.counts["masked_language"])


@pytest.mark.parametrize("side", ["image", "text"])
def test_evaluation_leaves_the_queues_alone(side):
    model = albef().eval()
    PretrainingModule(model, ALBEF.active).eval()(random_batch(range(PAIRS)))
    queue: FeatureQueue = model.heads["momentum_contrastive"][side]
    before = queue.features.clone()
    queue.after_step(applied=True)
    assert torch.equal(queue.features, before)


def test_queue_that_the_batch_does_not_divide_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--config=engine/recipes/albef_base.yaml", "--train.global_batch=500"])
    assert "objectives.momentum_contrastive.queue must hold a whole number of global batches" in capsys.readouterr().err


def test_copy_begins_with_weights_that_were_loaded():
    model = build_model(parse(["--config=engine/recipes/albef_base.yaml", "--tiny=true"]), 64)
    redraw(model, 7)
    model.teacher.begin()
    for own, source in model.teacher.parameter_pairs():
        assert torch.equal(own, source)
