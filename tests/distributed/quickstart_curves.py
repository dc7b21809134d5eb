"""The quickstart recipe, shrunk, under each ZeRO stage, and the same in plain PyTorch."""

from collections.abc import Iterator

import torch
from launch import ROOT

from engine import pretrain
from engine.build import build_model
from engine.config import Config
from engine.data import load_training_sets, make_tokenizer, training_stream
from engine.objectives import PretrainingModule
from engine.training import zero
from engine.training.command_line import parse
from engine.training.step import agree, normalizers, run_window

RATES = (0.05, 0.05, 1024.0)
"""Of each step. After the last, weights are small beside their change, which is then the gradient."""
RECIPE = ROOT / "engine" / "recipes" / "quickstart.yaml"


def quickstart(cache: str, stage: int = 1) -> Config:
    """SGD without clipping or decay, dropout everywhere, all three losses."""
    dropout = [
        f"--model.{tower}.{kind}=0.1"
        for tower in ("image", "text", "fusion")
        for kind in ("dropout", "attention_dropout")
    ]
    sgd = ["--optimizer.kind=sgd", "--optimizer.clip=0", "--optimizer.weight_decay=0"]
    rest = [f"--data.cache={cache}", f"--zero.stage={stage}"]
    return parse(["--config", str(RECIPE), "--tiny=true", "--device=cpu", *dropout, *sgd, *rest])


def windows(config: Config, rank: int, world: int) -> tuple[int, Iterator[list]]:
    """Size of the vocabulary, and the real stream of batches."""
    sets = load_training_sets(config)
    tokenizer = make_tokenizer(config, sets)
    return tokenizer.vocab_size, training_stream(config, sets, tokenizer, rank, world, step=0, samples_seen=0)


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def plain_curve(cache: str) -> list[dict]:
    """The definition: one process, one batch, torch's SGD. Losses and the change of every weight."""
    config = quickstart(cache)
    vocab_size, stream = windows(config, rank=0, world=1)
    torch.manual_seed(config.seed)
    model = build_model(config, vocab_size)
    model.rng.state[0] = config.seed
    module = PretrainingModule(model, config.objectives.active)
    optimizer = torch.optim.SGD(module.parameters())
    points = []
    for rate in RATES:
        (batch,) = next(stream)
        optimizer.param_groups[0]["lr"] = rate
        batch.normalizers = normalizers(batch.counts, 1, torch.device("cpu"))
        before = weights_of(module)
        loss, losses, _ = module(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.rng.advance()
        points.append(point({"loss": loss, **losses}, before, weights_of(module)))
    return points


def zero_curve(cache: str, stage: int) -> list[dict]:
    """The same through the engine, on all ranks."""
    config = quickstart(cache, stage)
    ranks = zero.join(config)
    vocab_size, stream = windows(config, ranks.rank, ranks.world)
    engine, learning_rate = pretrain.build_engine(config, ranks, vocab_size)
    points = []
    for rate in RATES:
        window = next(stream)
        agreement = agree(window, ranks, stop=False)
        for group in learning_rate.optimizer.param_groups:
            group["lr"] = rate
        with engine.whole_module() as whole:
            before = weights_of(whole)
        result = run_window(engine, window, agreement.counts, ranks, engine.module.model.rng)
        assert result.applied
        named = {name: result.values[name] for name in ("loss", *config.objectives.active)}
        means = dict(zip(named, ranks.mean(torch.stack(list(named.values()))), strict=True))
        with engine.whole_module() as whole:
            points.append(point(means, before, weights_of(whole)))
    return points


def point(losses: dict, before: dict, after: dict) -> dict:
    changes = {name: (after[name] - before[name]).flatten().tolist() for name in before}
    return {"losses": {name: value.item() for name, value in losses.items()}, "changes": changes}
