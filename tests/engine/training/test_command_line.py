"""The command line: recipes, overrides, and one clear line for every mistake."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from engine.config import TINY, Config
from engine.recipes.__main__ import main as table_of_systems
from engine.training.command_line import make_parser, parse

RECIPES = sorted((Path(__file__).parents[3] / "engine" / "recipes").glob("*.yaml"))
QUICKSTART = ["--config", str(RECIPES[0].with_name("quickstart.yaml"))]


def leaves(section, path: str = "") -> list[str]:
    """Dotted names of all options."""
    names = []
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        name = f"{path}{item.name}"
        names += leaves(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return names


def mistake(capsys, *argv: str) -> str:
    """The one line that a wrong command line prints."""
    with pytest.raises(SystemExit) as stopped:
        parse([*QUICKSTART, *argv])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1, (stopped.value.code, out, err)
    return err.removeprefix("pretrain: error: ").strip()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_shrinks(recipe):
    config = parse(["--config", str(recipe)])
    assert config.name == recipe.stem
    tiny = parse(["--config", str(recipe), "--tiny", "true"])
    for path, cap in TINY.items():
        value = tiny
        for name in path.split("."):
            value = value and getattr(value, name)
        assert value is None or value <= cap, path


def test_what_is_printed_parses_back_to_the_same_run(capsys, tmp_path):
    argv = [*QUICKSTART, "--optimizer.lr", "3e-4", "--objectives.matching", "null", "--data.source", "[a, b]"]
    with pytest.raises(SystemExit) as stopped:
        parse([*argv, "--print_config"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(printed)
    config = parse(["--config", str(recipe)])
    assert config == parse(argv)
    assert config.optimizer.lr == 3e-4 and config.objectives.matching is None
    assert config.data.source == ["a", "b"]
    assert set(yaml.safe_load(printed)) == {item.name for item in dataclasses.fields(Config)}


def test_help_lists_and_explains_every_option():
    parser = make_parser()
    text = parser.format_help()
    for name in leaves(parse(QUICKSTART)):
        assert re.search(rf"--{re.escape(name)}\b", text), name
    explanations = {action.dest: action.help for action in parser._actions}
    assert [name for name, text in explanations.items() if not text or text.startswith("(")] == []


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--optimizer.lrr", "3"], "unknown option optimizer.lrr; did you mean optimizer.lr?"),
        (["--optim.lr=3"], "unknown option optim.lr; did you mean optimizer.lr?"),
        (
            ["--objectives.contrastive.weigt", "2"],
            "unknown option objectives.contrastive.weigt; did you mean objectives.contrastive.weight?",
        ),
        (["--optimizer.lr", "fast"], "optimizer.lr: expected float. Got value: fast"),
        (["--impl", "triton"], "impl: expected one of ['auto', 'reference']. Got value: triton"),  # no op has all
        (["--zero.stage", "4"], "zero.stage: expected one of [0, 1, 2, 3]. Got value: 4"),
        (["--config", "nowhere.yaml"], "config: File does not exist: "),
        (["--deepspeed_config", "ds.json"], "--deepspeed_config is not taken: the recipe alone"),
        (["--optimizer.kind", "lamb"], "optimizer.kind 'lamb' needs whole parameters but ZeRO"),
        (["--optimizer.kind", "Adafactor"], "optimizer.kind 'Adafactor' needs whole parameters"),
        (["--optimizer.kind", "adamx"], "optimizer.kind 'adamx' is not known: use adamw or sgd"),
        (["--precision", "fp16", "--device", "cpu"], "precision fp16 needs a GPU: on a cpu use bf16 or fp32"),
        (["--precision", "bf16", "--zero.stage", "0"], "zero.stage 0 with precision bf16 makes a wrong"),
        (["--train.accumulation", "2"], "objectives.matching.negatives must be local with 2 micro-batches per rank"),
        (["--train.accumulation=2", "--train.micro_batch=8"], "train.accumulation follows from train.micro_batch = 8"),
        (["--train.micro_batch", "0"], "train.micro_batch must be positive, got 0"),
        (["--train.max_pairs", "null"], "train.max_steps or train.max_pairs must say how long the run is"),
        (["--train.global_batch", "1"], "train.global_batch must be at least 2"),
        (["--model.image.heads", "3"], "model.image.heads must divide model.image.width = 128, got 3"),
        (["--model.text.dropout", "1.0"], "model.text.dropout must be in [0, 1), got 1.0"),
        (["--model.image.heads", "x"], "model.image.heads: expected int. Got value: x"),
        (["--objectives.masked_language.probability=3"], "objectives.masked_language.probability must be in"),
        (["--train.buckets.tokens=0"], "train.buckets.tokens must be positive, got 0"),
        (["--train.buckets.size=8"], "train.buckets makes batches of uneven size: say with train.max_steps"),
        (
            ["--train.buckets.size=8", "--train.max_steps=1", "--train.max_pairs=null"],
            "train.buckets needs the lengths of all examples before they are read, which data.regions gives",
        ),
        (["--model.text", "null"], "model.fusion needs model.text, which is null"),
        (["--data.regions.classes", "9"], "data.regions is what model.image.kind regions reads: give both or neither"),
        (["--objectives.random_matching.weight", "1"], "objectives.random_matching needs model.joint"),
        (["--data.sets", "{a: {source: b, tasks: {matchin: 1}}}"], "data.sets: tasks must be objectives of the"),
        (["--data.sets", "{a: {source: b, tasks: {matching: 1}}}"], "data.sets: no set has the task contrastive"),
        (["--data.sets", "{a: {source: b, tasks: {matching: 0}}}"], "data.sets: the ratio of matching must be pos"),
        (["--data.image_size", "30"], "data.image_size must be a multiple of model.image.patch_size = 8"),
        (["--data.image_size", "64"], "model.image.max_grid must hold data.image_size / patch_size = 8"),
        (["--data.max_caption_tokens", "65"], "data.max_caption_tokens must not exceed model.text"),
        (["--data.source", "0.tar", "1.tar"], "unrecognized arguments: 1.tar: an option takes one value; put a pattern"),
        (["--name", "../else"], "name must be the name of a folder, got '../else'"),
        (["--optimizer.lr", "-1"], "optimizer.lr must be positive, got -1.0"),
        (["--train.keep_checkpoints", "1"], "train.keep_checkpoints must be at least 2, got 1"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line(capsys, argv, line):
    assert mistake(capsys, *argv).startswith(line)


def test_a_command_line_without_a_recipe_names_what_is_missing(capsys):
    with pytest.raises(SystemExit):
        parse([])
    assert "objectives: at least one must be given; --config RECIPE gives those" in capsys.readouterr().err


def test_a_tiny_run_tells_what_it_lowers_of_the_command_line(capsys):
    config = parse([*QUICKSTART, "--tiny=true", "--train.max_steps=20", "--model.image.width", "64", "--train.log_every=1"])
    assert config.train.max_steps == 12
    line = "pretrain: --tiny true makes it model.image.width 32 (64 was given), train.max_steps 12 (20 was given)\n"
    assert capsys.readouterr() == ("", line)
    parse([*QUICKSTART, "--tiny=true", "--train.max_steps=3"])
    parse([*QUICKSTART, "--train.max_steps=20"])
    assert capsys.readouterr() == ("", "")


def test_a_tiny_run_reads_the_data_that_the_command_line_names():
    clip = ["--config", str(RECIPES[0].with_name("clip_vit_b32.yaml")), "--tiny=true"]
    assert parse(clip).data.source == parse(clip).data.held_out == "builtin"
    own = parse([*clip, "--data.source=mine.tar", "--data.held_out", "other.tar"]).data
    assert (own.source, own.held_out) == ("mine.tar", "other.tar")
    assert parse([*clip, "--data.source=mine.tar", "--data.tiny_source=builtin-scenes"]).data.source == "builtin-scenes"


def test_an_unknown_key_in_a_recipe_is_one_clear_line(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optimizer:\n  learning_rate: 3e-4\n")
    assert mistake(capsys, "--config", str(recipe)).startswith("unknown option optimizer.learning_rate")


def test_a_key_that_stands_twice_in_a_recipe_is_one_clear_line(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1\noptimizer:\n  lr: 1.0e-3\n  clip: 1.0\n  lr: 2.0e-3\n")
    for arguments in (["--config", str(recipe)], [f"--config={recipe}"]):
        assert mistake(capsys, *arguments) == f"{recipe}: optimizer.lr is given twice, on lines 3 and 5"


def test_the_table_of_systems_explains_itself(capsys):
    assert table_of_systems(["--help"]) == 0 and "[NAME ...]" in capsys.readouterr().out
    assert table_of_systems(["nobody"]) == 2 and "no recipe nobody; there are albef_base" in capsys.readouterr().err


def test_only_rank_0_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        parse([*QUICKSTART, "--zero.stage", "4"])
    assert stopped.value.code == 2 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("extra", [["--local_rank=1"], ["--local-rank", "1"], ["--deepspeed"]])
def test_arguments_of_the_launcher_are_left_out(extra):
    assert parse([*extra, *QUICKSTART]) == parse(QUICKSTART)


def test_the_micro_batch_must_divide():
    config = parse([*QUICKSTART, "--train.global_batch", "128"])
    assert config.micro_batch(4) == 32
    with pytest.raises(ValueError, match=r"train.global_batch must be divisible by .* = 3 \* 1, got 128"):
        config.micro_batch(3)


def test_micro_steps_follow_from_the_micro_batch_and_the_ranks():
    argv = [*QUICKSTART, "--train.global_batch=32768", "--train.micro_batch=64"]
    config = parse([*argv, "--objectives.matching.negatives=local"])
    assert [config.micro_steps(world) for world in (1, 8, 512)] == [512, 64, 1]
    assert [config.micro_batch(world) for world in (1, 8, 512)] == [64, 64, 64]
    line = r"train.global_batch must be divisible by ranks \* train.micro_batch = 3 \* 64, got 32768"
    with pytest.raises(ValueError, match=line):
        config.micro_steps(3)
    config = parse(argv)
    assert config.micro_steps(512) == 1
    with pytest.raises(ValueError, match="objectives.matching.negatives must be local with 2 micro-batches"):
        config.micro_steps(256)
    tiny = parse([*argv, "--objectives.matching=null", "--tiny=true"])
    assert [tiny.micro_steps(world) for world in (1, 2, 4)] == [4, 2, 1]


@pytest.mark.parametrize(("batch", "micro_batch", "tiny"), [(128, 128, 12), (128, 64, 6), (10, 5, 5), (8, 4, 4), (120, 24, 12)])
def test_a_tiny_run_has_as_many_micro_batches_as_it_can_of_the_whole_one(batch, micro_batch, tiny):
    """Where the whole run has one, and so may draw matching's negatives from all ranks, the tiny one has one too."""
    argv = [*QUICKSTART, f"--train.global_batch={batch}", f"--train.micro_batch={micro_batch}"]
    world = batch // micro_batch
    assert parse(argv).micro_steps(world) == 1
    config = parse([*argv, "--tiny=true"])
    assert config.train.micro_batch == tiny and config.micro_steps(config.train.global_batch // tiny) == 1


def test_the_run_ends_at_the_smaller_limit():
    limits = ["--train.global_batch=128", "--train.max_pairs=1000", "--train.max_steps=7"]
    train = parse([*QUICKSTART, *limits]).train
    assert train.total_steps == 7
    assert dataclasses.replace(train, max_steps=None).total_steps == 8
