"""The table of small runs: settings by path, rows that are not repeated, failures that stop nobody, losses that cannot lie."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import systems
from engine.recipes import table

FIGURES = {"loss": 5.0, "loss_unigram": 4.0, "accuracy": 0.1}
SUMMARY = {"samples_seen": 64, "evaluation": {"pairs": 8, "masked_language": FIGURES}}


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Runs of nothing, whose rows and page are in a folder of the test: which there were, which fail, by what commit."""
    runs, failing, commit = [], set(), {"commit": "a", "modified": False, "date": "2026"}

    def train(run, output):
        runs.append(run["name"])
        if run["name"] in failing:
            raise subprocess.CalledProcessError(1, "pretrain")
        return SUMMARY

    def store(name, row, device):
        path = tmp_path / "here" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row | commit) + "\n")

    settings = tmp_path / "settings.yaml"
    settings.write_text("all: {train.max_steps: 40}\nvit_b16: {optimizer.lr: 0.5}\nlong: {recipe: vit_b16}\n")
    monkeypatch.setattr(systems, "train", train)
    monkeypatch.setattr(systems, "store", store)
    monkeypatch.setattr(systems, "provenance", lambda device: commit)
    monkeypatch.setattr(systems, "stored_rows", lambda read=systems.stored_rows: read(tmp_path))
    monkeypatch.setattr(systems, "PAGE", tmp_path / "SYSTEMS.md")
    monkeypatch.setattr(systems, "SETTINGS", settings)
    return SimpleNamespace(runs=runs, failing=failing, commit=commit, page=systems.PAGE)


def test_settings_are_paths_over_those_of_all(recorded):
    shared, own = systems.described(systems.SETTINGS)
    assert own.keys() == {*table.names(), "long"}
    run = systems.small("vit_b16", shared, own["vit_b16"])
    assert (run["optimizer"]["lr"], run["train"]["max_steps"], run["schedule"]["warmup_steps"]) == (0.5, 40, 2)
    assert (run["model"]["image"]["width"], run["data"]["source"]) == (64, "builtin-glyph-classes")
    with pytest.raises(ValueError, match="vit_b16 has no setting train.steps"):
        systems.small("vit_b16", shared, {"train.steps": 3})


def test_what_is_listed_is_a_recipe_or_says_whose_it_is():
    for name, own in systems.described(systems.SETTINGS)[1].items():
        assert own.get("recipe", name) in table.names()


def test_a_stored_run_is_not_repeated(recorded):
    assert systems.main(["vit_b16"]) == 0 and systems.main(["vit_b16", "long"]) == 0
    assert recorded.runs == ["vit_b16", "long"]
    recorded.commit["commit"] = "b"
    assert systems.main(["vit_b16", "long", "--missing"]) == 0 and len(recorded.runs) == 2
    assert systems.main(["vit_b16"]) == 0 and len(recorded.runs) == 3
    recorded.commit["modified"] = True
    assert systems.main(["vit_b16"]) == 0 and len(recorded.runs) == 4


def test_settings_are_known_by_what_is_written_down():
    """The recipe, what differs from it, and all that was trained before; not what the engine has besides."""
    shared, listed = {"train.max_steps": 40}, {"gpt": {}, "first": {"recipe": "gpt"}, "then": {"recipe": "gpt"}}
    listed["then"]["init_from"] = {"text": "first"}
    named = systems.digest("then", shared, listed)
    assert named == systems.digest("then", dict(shared), {**listed, "gpt": {"optimizer.lr": 0.1}})
    changes = [
        ({"train.max_steps": 41}, listed),
        (shared, {**listed, "first": {"recipe": "gpt", "optimizer.lr": 0.1}}),
        (shared, {**listed, "then": {**listed["then"], "optimizer.lr": 0.1}}),
        (shared, {**listed, "then": {**listed["then"], "recipe": "gpt2"}}),
    ]
    assert len({named, *(systems.digest("then", *change) for change in changes)}) == 5


def test_a_failure_stops_nobody_and_is_told(recorded, capsys):
    recorded.failing.add("long")
    assert systems.main(["long", "vit_b16"]) == 1
    assert recorded.runs == ["long", "vit_b16"] and "no row of long" in capsys.readouterr().err
    assert "`vit_b16`" in recorded.page.read_text() and "`long`" not in recorded.page.read_text()


@pytest.mark.parametrize("loss, end", [(5.0, "5 | 4 (unigram) | **not below** |"), (3.0, "3 | 4 (unigram) |  |"),
                                       (3.9999, "4 | 4 (unigram) | **not below** |")])  # fmt: skip
def test_a_loss_that_is_not_below_is_marked(recorded, monkeypatch, loss, end):
    """In the digits that are shown."""
    monkeypatch.setitem(FIGURES, "loss", loss)
    systems.main(["vit_b16"])
    (row,) = [line for line in recorded.page.read_text().splitlines() if line.startswith("| `vit_b16`")]
    assert "| 40 | 0.5 |" in row and row.endswith(f"| masked_language | {end}")


def test_a_run_begins_with_the_weights_of_another(tmp_path, monkeypatch):
    commands = []

    def finish(command, check):
        commands.append(command)
        if "--config" in command:
            run = yaml.safe_load(Path(command[command.index("--config") + 1]).read_text())
            folder = tmp_path / run["name"]
            folder.mkdir()
            (folder / "summary.json").write_text(json.dumps(run["init_from"]))
        else:
            Path(command[-1]).mkdir()

    monkeypatch.setattr(systems.subprocess, "run", finish)
    shared, listed = systems.described(systems.SETTINGS)
    begun = systems.train(systems.small("distilbert", shared, listed["distilbert"]), tmp_path)
    assert begun == {"teacher": str(tmp_path / "bert_deep-published")}
    assert [command[-2:] for command in commands[1:2]] == [[str(tmp_path / "bert_deep"), begun["teacher"]]]
    assert [Path(command[command.index("--config") + 1]).stem for command in commands[::2]] == ["bert_deep", "distilbert"]
    begun = systems.train(systems.small("frozen", shared, listed["frozen"]), tmp_path)
    assert begun == {"decoder": str(tmp_path / "frozen_words")} and len(commands) == 5
