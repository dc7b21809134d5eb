"""A recipe of every kind of state, shrunk, on all ranks under ZeRO, and the same in plain PyTorch."""

from collections.abc import Iterator

import torch
from launch import ROOT
from quickstart_curves import windows

from engine import pretrain
from engine.batch import Batch
from engine.build import build_model
from engine.config import Config
from engine.models.batch_norm import BatchNorm
from engine.models.codebook import Codebook
from engine.objectives import PretrainingModule
from engine.training import zero
from engine.training.command_line import parse
from engine.training.optimizer import freeze
from engine.training.step import agree, normalizers, run_window

STEPS, MOMENTUM, STAGES = 2, 0.8, (2, 3)
KINDS = {
    "plain": ("vit_b16", "--optimizer.lr=1"),
    "tied": ("t5_base", "--optimizer.lr=1", "--tokenizer.kind=bpe"),  # two trainings of a unigram tokenizer may differ
    "frozen": ("blip2_stage2", "--optimizer.lr=10"),
    "mixed": ("simvlm_base", "--optimizer.lr=0.3", "--tokenizer.kind=bpe"),
    "momentum": ("albef_base", "--optimizer.lr=0.3", "--objectives.matching.negatives=global"),
    "queries": ("e2e_vlp", "--optimizer.lr=0.1", "--data.sets=null", "--data.tiny_source=builtin-scenes",
                "--objectives.masked_language=null", "--objectives.random_matching=null", "--optimizer.lr_multipliers={}",
                "--schedule.decay_at=[]", "--model.joint.image.backbone_norm=batch"),
    "codebook": ("soho", "--optimizer.lr=0.1", "--optimizer.rules={}", "--schedule.decay_at=[]"),
}
"""Words of t5_base embed both of its texts and are its head; its tables of relative bias belong to a stack and are read by
the blocks. simvlm_base has documents beside its pairs. Object queries of e2e_vlp belong to a head, the decoder reads them, and
what it answers is matched. Copies and queues of albef_base follow the steps, as codes of soho and batch norms of backbones
do. Rates let norms move by far more than the spacing of float32 around 1."""


def configuration(kind: str, cache: str, stage: int = 2) -> Config:
    """SGD, whose change of a weight is its gradient; dropout as in the recipe."""
    name, *own = KINDS[kind]
    sgd = ["--optimizer.kind=sgd", "--optimizer.weight_decay=0", "--optimizer.clip=0"]
    steady = ["--schedule.kind=constant", "--schedule.warmup_steps=0", f"--model.momentum={MOMENTUM}"]
    run = ["--tiny=true", "--device=cpu", "--precision=fp32", f"--data.cache={cache}", f"--zero.stage={stage}"]
    return parse(["--config", str(ROOT / "engine" / "recipes" / f"{name}.yaml"), *sgd, *steady, *run, *own])


def plain(kind: str, cache: str, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """The definition: one process, torch's SGD, a copy and queues moved by hand. The states before and after the steps."""
    config = configuration(kind, cache)
    vocab_size, stream = windows(config, rank=0, world=1)
    torch.manual_seed(config.seed)
    model = build_model(config, vocab_size).to(dtype)
    freeze(config.optimizer.freeze, model.named_parameters())
    model.rng.state[0] = config.seed
    yield states(model)
    module = PretrainingModule(model, config.objectives.active)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], config.optimizer.lr)
    for step in range(STEPS):
        batch = whole(next(stream), dtype)
        batch.normalizers, batch.progress = normalizers(batch.counts, 1, torch.device("cpu")), step / config.train.total_steps
        optimizer.zero_grad()
        module(batch)[0].backward()
        keys = features_of_copy(model, batch)
        optimizer.step()
        model.rng.advance()
        follow(model, keys, step)
    yield states(model)


def whole(window: list[Batch], dtype: torch.dtype) -> Batch:
    """The only batch of a window, its picture in this type."""
    (batch,) = window
    if batch.image is not None:
        batch.image.values = batch.image.values.to(dtype)
    return batch


@torch.no_grad()
def features_of_copy(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    if model.teacher is None:
        return {}
    copied = model.teacher.module
    return {"image": copied.image_features(batch), "text": copied.text_features(batch)}


@torch.no_grad()
def follow(model: torch.nn.Module, keys: dict[str, torch.Tensor], step: int) -> None:
    """Copies near what they follow; the oldest features of the queues give way. Codes and the statistics of batch norms
    follow what this process alone has seen."""
    for part in model.modules():
        if isinstance(part, (Codebook, BatchNorm)):
            part.after_step(applied=True)
    for own, source in model.teacher.parameter_pairs() if model.teacher is not None else ():
        own.copy_(MOMENTUM * own + (1 - MOMENTUM) * source)
    for side, new in keys.items():
        model.heads["momentum_contrastive"][side].features[step * len(new) : (step + 1) * len(new)] = new


def under_zero(kind: str, cache: str, stage: int) -> dict[str, torch.Tensor]:
    """The same through the engine, on all ranks."""
    config = configuration(kind, cache, stage)
    ranks = zero.join(config)
    vocab_size, stream = windows(config, ranks.rank, ranks.world)
    engine, learning_rate = pretrain.build_engine(config, ranks, vocab_size)
    for step in range(STEPS):
        window = next(stream)
        learning_rate.set(step)
        for batch in window:
            batch.progress = step / config.train.total_steps
        result = run_window(engine, window, agree(window, ranks, stop=False).counts, ranks, engine.module.model.rng)
        assert result.applied
    with engine.whole_module() as module:
        return states(module.model)


def states(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights, each tied one once, and all else that is in a checkpoint."""
    kept = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach().clone() for name, value in kept.items() if value.is_floating_point()}
