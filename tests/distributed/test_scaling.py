"""The model of a cluster run against runs of 1, 2 and 4 processes: bytes on the wire exactly, model states within 10 %."""

from itertools import product
from pathlib import Path

import pytest
from launch import run
from process_group import process_group_of_one
from scaling_worker import CASES, Case, measure, run_of

from benchmarks import scaling, scaling_docs
from tests.mutants import load_mutant

__all__ = ["process_group_of_one"]
WORKER = Path(__file__).with_name("scaling_worker.py")
WORLDS = (1, 2, 4)
WITHIN = 0.10
MUTANTS = {
    "gradients of stage 2 once a step": ("run.micro_steps if run.stage == 2 else 1", "1"),
    "gradients reduced to one, as ZeRO-2 is described": ("return 2 * (ranks - 1) * nbytes", "return (ranks - 1) * nbytes"),
    "another stage": ("_sharded_states if run.stage == 3", "_sharded_states if run.stage == 2"),
    "the wire of another stage": ("_sharded_wire(run) if run.stage == 3", "_sharded_wire(run) if run.stage == 2"),
    "partitions without padding": ("return math.ceil(numel / multiple) * multiple", "return numel"),
    "parameters of a double size": ('"fp32": 4, "bf16": 2', '"fp32": 8, "bf16": 4'),
    "one moment": ("12 * sum(flat)", "8 * sum(flat)"),
    "one moment of shares": ("12 * share", "8 * share"),
    "gradients of a partition alone": ("gradients = 4 * sum(touched)", "pass"),
    "frozen parameters forgotten": ("run.element * (sum(flat) + frozen)", "run.element * sum(flat)"),
    "nothing gathered again": ("between >= run.reuse_distance", "False"),
    "small parameters gathered as others": ("return weight.numel <= PERSISTENT_UP_TO", "return False"),
    "a ring that takes one trip": ("others * block * (2 * run.element + 4)", "others * block * (run.element + 4)"),
    "numbers of rows forgotten": ("+ 8 * run.pairs)", ")"),
}


@pytest.fixture(scope="module")
def found() -> dict[int, list[list[dict]]]:
    """By world, rank and case; one process is this one."""
    several = {world: [rank.result() for rank in run([WORKER], world=world, timeout=200)] for world in WORLDS[1:]}
    return {1: [measure(CASES)], **several}


def differences(model, found: dict[int, list[list[dict]]], case: Case, world: int) -> list[str]:
    """What this case's ranks sent and held otherwise than the model says."""
    planned, wrong = run_of(case, world), []
    for rank in range(world):
        seen = found[world][rank][CASES.index(case)]
        if seen["wire"] != model.wire(planned):
            wrong.append(f"rank {rank} sends {seen['wire']}, predicted {model.wire(planned)}")
        states = model.model_states(planned, rank)
        wrong += [
            f"rank {rank} holds {seen['memory'][kind]} bytes of {kind}, predicted {states[kind]}"
            for kind in states
            if abs(states[kind] / seen["memory"][kind] - 1) > WITHIN
        ]
    return wrong


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_send_and_hold_what_is_predicted(found, case, world):
    assert differences(scaling, found, case, world) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_model_is_noticed(name, found, tmp_path):
    mutant = load_mutant(scaling, *MUTANTS[name], tmp_path)
    assert any(differences(mutant, found, case, world) for case, world in product(CASES, WORLDS))


def test_the_page_and_its_pictures_are_not_stale():
    stale = [path.name for path, text in scaling_docs.files().items() if path.read_text() != text]
    assert stale == [], "run `python -m benchmarks.scaling`"


def test_more_ranks_never_hold_more_of_a_state():
    for stage, model in product((1, 2, 3), scaling_docs.MODELS):
        held = [sum(scaling.model_states(scaling_docs.planned(model, stage, ranks)).values()) for ranks in scaling_docs.RANKS]
        assert held == sorted(held, reverse=True), (stage, model.name)


def test_sizes_of_the_models_are_the_published_ones():
    clip, albef = (scaling.total(w for part in model.parts for w in part.weights) for model in scaling_docs.MODELS)
    trained = scaling.total(w for part in scaling_docs.MODELS[1].parts for w in part.weights if w.trained)
    assert clip == pytest.approx(427.6e6, rel=1e-3)
    assert trained == pytest.approx(209.5e6, rel=1e-2) and albef == pytest.approx(2 * trained, rel=1e-3)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"stage": 4}, "stage must be 0, 1, 2 or 3, got 4"),
        ({"stage": 1, "dtype": "fp16"}, "dtype must be fp32 or bf16, got fp16"),
        ({"stage": 0}, "use fp32 or stage 1"),
        ({"stage": 1, "exchange": "dense"}, "exchange must be None, gather or ring, got dense"),
    ],
)
def test_a_run_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        scaling.Run(parts=(), ranks=2, **wrong)
