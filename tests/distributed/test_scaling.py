"""The model of a cluster run against runs of 1, 2 and 4 processes: bytes on the wire exactly, model states within 1 %."""

from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
from launch import run
from scaling_worker import CASES, WORLDS, Case, run_of

from benchmarks import scaled_models, scaling, scaling_docs
from tests.mutants import load_mutant

WORKER = Path(__file__).with_name("scaling_worker.py")
WITHIN = 0.01
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
    "nothing gathered again": ('between >= run.sizes["stage3_max_reuse_distance"]', "False"),
    "small parameters gathered as others": ('return weight.numel <= run.sizes["stage3_param_persistence_threshold"]', "return False"),
    "a ring that takes one trip": ("others * block * (2 * run.element + 4)", "others * block * (run.element + 4)"),
    "numbers of rows forgotten": ("+ 8 * run.pairs)", ")"),
}


@pytest.fixture(scope="module")
def found() -> dict[int, list[list[dict]]]:
    """By world, rank and case."""
    (worlds,) = run([WORKER], timeout=240)
    return {int(world): ranks for world, ranks in worlds.result().items()}


def differences(model: ModuleType, found: dict[int, list[list[dict]]], case: Case, world: int) -> list[str]:
    """What this case's ranks sent and held otherwise than the model says."""
    planned, wrong = run_of(case, world, model), []
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
    assert stale == [], "run `python -m benchmarks.scaling_docs`"


def test_more_ranks_never_hold_more_of_a_state():
    for stage, model in product((1, 2, 3), scaling_docs.MODELS):
        held = [sum(scaling.model_states(scaling_docs.planned(model, stage, ranks)).values()) for ranks in scaling_docs.RANKS]
        assert held == sorted(held, reverse=True), (stage, model.name)


def test_the_loss_holds_what_the_architecture_page_says():
    pairs, width, ranks = 32, 16, 8
    options = {"parts": (), "stage": 1, "ranks": ranks, "loss_width": width, "samples": pairs}
    assert scaling.loss_memory(scaling.Run(exchange="gather", **options)) == 4 * pairs * ranks * width
    assert scaling.loss_memory(scaling.Run(exchange="ring", **options)) == 20 * pairs * width
    assert scaling.loss_memory(scaling.Run(**options)) == 0


def test_a_loss_of_the_whole_step_is_exchanged_once():
    options = {"parts": (), "stage": 0, "ranks": 4, "dtype": "fp32", "exchange": "ring", "loss_width": 16}
    cached = scaling.Run(samples=8, micro_steps=4, loss_samples=32, **options)
    assert scaling.wire(cached) == scaling.wire(scaling.Run(samples=32, **options))


def test_activations_are_given_or_estimated():
    tower = scaling.Part("tower", scaled_models.transformer(layers=6, width=16), tokens=10, layers=6, width=16)
    options = {"parts": (tower,), "stage": 1, "ranks": 2, "samples": 3}
    assert scaling.activations(scaling.Run(**options)) == 34 * 6 * 10 * 16 * 3
    assert scaling.activations(scaling.Run(**options, checkpointing=True)) == (2 * 6 + 34) * 10 * 16 * 3
    assert scaling.activations(scaling.Run(**options, activation_bytes=7)) == 7
    again, once = (scaling.flops(scaling.Run(**options, checkpointing=checkpointing)) for checkpointing in (True, False))
    assert again == pytest.approx(once * 4 / 3)


def test_slower_links_and_more_nodes_take_longer():
    model = scaling_docs.MODELS[0]
    times = [scaling.step_time(scaling_docs.planned(model, 1, ranks)) for ranks in (1, 8, 16)]
    assert times[0].communication == 0 and times[0].step < times[1].step < times[2].step
    slow = scaling.Assumptions(between=1e9)
    assert scaling.step_time(scaling_docs.planned(model, 1, 16), slow).exposed > 10 * times[2].exposed


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
