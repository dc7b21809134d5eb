"""Recipes of pages: what was published, and a run on a folder of rendered pages."""

import json

import pytest

from engine.data.builtin import page_drawing, prose
from engine.pretrain import main
from engine.recipes import table
from engine.training.telemetry import read_metrics

PAGES = 24
LOSSES = {"masked_language", "covered_lines", "page_matching"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pages as pages:FOLDER reads them."""
    folder = tmp_path_factory.mktemp("pages")
    documents = [one.sentences for one in prose.documents()]
    for number in range(PAGES):
        page = page_drawing.draw_page(number, documents)
        content = {"words": page.words, "boxes": page.boxes.tolist(), "lines": page.lines}
        page.picture.save(folder / f"{number}.png")
        (folder / f"{number}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", ["layoutlmv2_base", "layoutxlm_base"])
def test_text_stands_first_and_all_see_all(name):
    config = table.recipe(name)
    joint = table.model_of(config).joint
    assert joint.segments == ["text", "image"] and config.model.joint.mask == "full"
    assert config.model.joint.image.max_grid == (7, 7) and joint.text.page is not None
    losses = config.objectives
    assert (losses.masked_language.probability, losses.covered_lines.probability) == (0.15, 0.15)
    assert (losses.page_matching.replaced, losses.page_matching.dropped) == (0.15, 0.05)
    assert losses.masked_language.blank_words and not losses.masked_language.whole_word


def test_a_run_on_a_folder_of_pages(folder, tmp_path):
    recipe = str(table.FOLDER / "layoutlmv2_base.yaml")
    source = [f"--data.source=pages:{folder}", f"--data.held_out=pages:{folder}", "--data.tiny_source=null"]
    where = [f"--output={tmp_path}", f"--data.cache={tmp_path}", "--device=cpu", "--precision=fp32"]
    main(["--config", recipe, "--tiny=true", *source, *where, "--train.max_steps=3", "--train.log_every=1"])
    run = tmp_path / "layoutlmv2_base"
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert len(rows) >= 3 and (run / "model.safetensors").is_file()
    assert json.loads((run / "summary.json").read_text()).keys()
    assert LOSSES <= {name for row in read_metrics(run / "metrics.jsonl") for name in row}
