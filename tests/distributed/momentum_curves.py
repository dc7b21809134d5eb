"""ALBEF's recipe, shrunk, under ZeRO, and the same in plain PyTorch: weights, momentum copies and queues."""

import torch
from quickstart_curves import windows
from launch import ROOT

from engine import pretrain
from engine.build import build_model
from engine.config import Config
from engine.objectives import PretrainingModule
from engine.training import zero
from engine.training.command_line import parse
from engine.training.step import agree, normalizers, run_window

STEPS, RATE, STAGES = 2, 0.05, (2, 3)


def albef(cache: str, stage: int = 2) -> Config:
    """SGD; a copy that moves fast, negatives of all ranks."""
    sgd = ["--optimizer.kind=sgd", f"--optimizer.lr={RATE}", "--optimizer.weight_decay=0", "--schedule.kind=constant"]
    run = ["--tiny=true", "--device=cpu", "--precision=fp32", f"--data.cache={cache}", f"--zero.stage={stage}"]
    rest = ["--model.momentum=0.8", "--objectives.matching.negatives=global", "--schedule.warmup_steps=0"]
    return parse(["--config", str(ROOT / "engine" / "recipes" / "albef_base.yaml"), *sgd, *run, *rest])


def plain_states(cache: str) -> dict[str, list[float]]:
    """The definition: one process, torch's SGD, and a copy and queues moved by hand."""
    config = albef(cache)
    vocab_size, stream = windows(config, rank=0, world=1)
    torch.manual_seed(config.seed)
    model = build_model(config, vocab_size)
    model.rng.state[0] = config.seed
    module, queues = PretrainingModule(model, config.objectives.active), model.heads["momentum_contrastive"]
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        (batch,) = next(stream)
        batch.normalizers, batch.progress = normalizers(batch.counts, 1, torch.device("cpu")), step / config.train.total_steps
        with torch.no_grad():
            copied = model.teacher.module
            keys = {"image": copied.image_features(batch), "text": copied.text_features(batch)}
        optimizer.zero_grad()
        module(batch)[0].backward()
        optimizer.step()
        model.rng.advance()
        with torch.no_grad():
            for own, source in model.teacher.parameter_pairs():
                own.copy_(0.8 * own + 0.2 * source)
            size = len(batch.labels)
            for side, queue in queues.items():
                queue.features[step * size : (step + 1) * size] = keys[side]
    return flat(model)


def zero_states(cache: str, stage: int) -> dict[str, list[float]]:
    """The same through the engine, on all ranks."""
    config = albef(cache, stage)
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
    with engine.whole_module() as whole:
        return flat(whole.model)


def flat(model: torch.nn.Module) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in model.state_dict().items() if "next_row" not in name}
