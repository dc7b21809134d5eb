"""The transport kernels, interpreted as sm_90 runs them: the contract on resident and streamed plans, lengths, NaN, mutants."""

import dataclasses
import random

import pytest
import torch

import vlkernels as vk
from tests.mutants import load_mutant
from tests.ops import test_optimal_transport as shared
from vlkernels.core import triton_runtime
from vlkernels.core.spec import Case
from vlkernels.ops.optimal_transport import spec
from vlkernels.ops.optimal_transport.gpu import kernels, launches, tile_sizes
from vlkernels.testing import contract

SPEC = dataclasses.replace(spec.SPECS[0], deterministic=False)  # programs take turns: two runs prove nothing
RESIDENT = {case.name: case for case in SPEC.cases if case.name != "long"}


def _floor(fill):
    """Tokens along a few axes in uneven numbers: pairs that the first steps give up are needed again later."""
    directions = fill.normal(2, 3, grad=False)
    directions = torch.cat((directions, -directions))
    images, texts = (fill.integers(1, 17, (30,)).tolist() for _ in range(2))
    tokens = (directions[fill.integers(0, 4, (sum(side),))].requires_grad_() for side in (images, texts))
    layouts = {"image_layout": shared.layout_of(images), "text_layout": shared.layout_of(texts)}
    return {**dict(zip(("image_tokens", "text_tokens"), tokens)), **layouts, "beta": 0.1, "iterations": 50}


OWN = {
    "tiles": Case("tiles", lambda fill: spec._sides(fill, [70, 2], [33, 65], width=16, iterations=3)),
    "floor": Case("floor", _floor),
}
CASES = RESIDENT | OWN

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy tells of what a card computes silently


@pytest.fixture
def launched(monkeypatch):
    """The kernels that ran."""
    found, run = [], triton_runtime.Launch.run

    def record(launch):
        found.append(launch.kernel)
        run(launch)

    monkeypatch.setattr(triton_runtime.Launch, "run", record)
    return found


@pytest.fixture
def streamed(monkeypatch):
    """Plans of more than 16 x 16 pass through a program, sixteen texts at a time."""
    monkeypatch.setattr(tile_sizes, "MOST_RESIDENT", 256)


# Half types differ in what is loaded and stored, which few cases show.
HALF = ("joint stream, capacity", "aligned", "small norms")
CALLS = [(name, dtype) for name in RESIDENT for dtype in SPEC.dtypes if dtype == torch.float32 or name in HALF]


@pytest.mark.parametrize("name, dtype", CALLS)
def test_contract(launched, name, dtype):
    contract.verify(SPEC, CASES[name], dtype, "triton")
    assert launched == ([] if name == "no sample" else [kernels.resident_kernel, kernels.gradient_kernel])


@pytest.mark.parametrize("name", ["few steps, beta 1", "tiles"])
@pytest.mark.parametrize("dtype", SPEC.dtypes)
def test_streamed_contract(launched, streamed, name, dtype):
    contract.verify(SPEC, CASES[name], dtype, "triton")
    assert launched == [kernels.streaming_kernel, kernels.gradient_kernel]


def draw_lengths(seed, longest, samples):
    """Ragged, with an empty side, single tokens and one sample as long as may be."""
    draw = random.Random(seed)
    lengths = [[draw.choice((0, 1, draw.randint(1, longest))) for _ in range(samples)] for _ in range(2)]
    return [[longest, *side] for side in lengths]


@pytest.mark.parametrize("longest, width, samples", ((17, 1, 7), (33, 100, 6), (64, 8, 5), (90, 72, 4), (256, 24, 2)))
def test_any_lengths(launched, longest, width, samples):
    images, texts = draw_lengths(longest, longest, samples)
    case = Case("drawn", lambda fill: spec._joint(fill, images, texts, width=width, iterations=5))
    contract.verify(SPEC, case, torch.bfloat16, "triton")
    kernel = kernels.resident_kernel if longest <= 64 else kernels.streaming_kernel
    assert launched == [kernel, kernels.gradient_kernel]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("longest", (5, 70))
def test_raw_ops_are_what_they_say(longest, gradient):
    """All but the padding of plans and factors, which nobody reads, so that values are not compared."""
    images, layout = torch.randn(longest, 8), shared.layout_of([longest])
    sides = images, images.flip(1), layout.starts, layout.lengths, layout.starts, layout.lengths, 0, 0
    forward = torch.ops.vlkernels.optimal_transport_triton_forward.default
    given = *sides, longest, longest, 0.5, 3, gradient, "triton"
    torch.library.opcheck(forward, given, test_utils=("test_schema", "test_faketensor"))
    if gradient:
        backward = torch.ops.vlkernels.optimal_transport_triton_backward.default
        given = torch.ones(1), *sides, *forward(*given)[1:], "triton"
        torch.library.opcheck(backward, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("longest", (9, 100))
def test_without_gradients_a_resident_plan_is_not_written(monkeypatch, longest):
    images, texts, kept = torch.randn(longest, 8), torch.randn(longest - 2, 8), []

    def record(call, distances, plans, factors, *rest):
        kept.append(plans is not None)
        return original(call, distances, plans, factors, *rest)

    original = launches.plan_launch
    monkeypatch.setattr(launches, "plan_launch", record)
    found = [shared.one_sample(images, texts, impl="triton") for images in (images, images.clone().requires_grad_())]
    assert torch.equal(*found) and kept == [longest > 64, True]


SHARED = {
    "one pair": lambda: shared.test_one_token_each_costs_one_minus_the_cosine("triton"),
    "one against many": lambda: shared.test_one_token_against_many_costs_their_mean("triton"),
    "by hand": lambda: [shared.test_two_against_two_by_hand("triton", steps) for steps in (1, 2, 50)],
    "the first update": lambda: shared.test_the_first_update_starts_from_uniform_texts("triton"),
    "a joint stream": lambda: shared.test_a_joint_stream_is_read_in_place("triton"),
    "empty sides": lambda: shared.test_empty_sides_cost_nothing("triton"),
    "one gradient": lambda: shared.test_only_one_side_wants_a_gradient("triton"),
    "strides": lambda: shared.test_rows_of_any_stride_are_served("triton"),
    "equal and opposite": lambda: [shared.test_equal_and_opposite_tokens("triton", length) for length in (1, 2, 17)],
    "the floor": lambda: shared.test_plans_that_reach_the_floor_are_the_definitions("triton", 0.1, 50),
    "NaN": lambda: shared.test_poison_stays_in_its_sample("triton", float("nan")),
    "infinities": lambda: shared.test_poison_stays_in_its_sample("triton", float("inf")),
    "autocast": lambda: shared.test_autocast_leaves_it_in_float32("triton"),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_every_implementation_does(name):
    torch.manual_seed(0)
    SHARED[name]()


@pytest.mark.parametrize("name", ["empty sides", "NaN"])
def test_what_every_implementation_does_streamed(monkeypatch, name):
    monkeypatch.setattr(launches, "is_resident", lambda *_: False)
    torch.manual_seed(0)
    SHARED[name]()


# (old, new, the case that must notice, whether streamed)
MUTANTS = {
    "images scaled after texts": ("(weighted * text_scale[:, None], 0), is_image", "(weighted, 0), is_image", "few steps, beta 1", False),
    "the plan without a text's scale": ("plan = sent * text_scale[:, None]", "plan = sent", "ragged, empty sides", False),
    "no floor": ("tl.where(plan < SMALLEST_SHARE, SMALLEST_SHARE, plan)", "plan", "floor", False),
    "norms below 1e-5": ("tl.maximum(tl.sqrt_rn(squares), SMALLEST_NORM)", "tl.sqrt_rn(squares)", "small norms", False),
    "beta": ("triton_math.LOG2_E / beta", "triton_math.LOG2_E / 0.5", "few steps, beta 1", False),
    "one step less": ("(n > 0), iterations, 0)", "(n > 0), iterations - 1, 0)", "one step", False),
    "projection": ("values.to(tl.float32) * (unit * share)[:, None]", "0.0", "ragged, empty sides", False),
    "projection of a constant norm": ("tl.sqrt_rn(squares) >= SMALLEST_NORM", "squares >= 0.0", "small norms", False),
    "sign": ("factor = -cotangent * unit", "factor = cotangent * unit", "one step", False),
    "unit of the others": ("* other_unit[:, None], toward", ", toward", "one step", False),
    "a gap left": ("(sample + 1 < samples, following, first", "(sample < 0, following, first", "joint stream, capacity", False),
    "the head left": ("tl.where(sample == 0, first, 0)", "0", "joint stream, capacity", False),
    "the tail left": ("past + sample * part, tl.minimum", "rows, tl.minimum", "joint stream, capacity", False),
    "the second tile of a side": ("first_text, m, tile - text_tiles,", "first_text, m, 0,", "tiles", False),
    "other rows of the first tile": ("other_first + begin, other_count - begin", "other_first, other_count", "tiles", False),
    "own rows of the first tile": ("first + tile * ROWS, left", "first, left", "tiles", False),
    "streamed: the sums of one tile": ("sums += tl.sum(weighted * text", "sums = tl.sum(weighted * text", "tiles", True),
    "streamed: along the images": ("of_images += tl.sum", "of_images = tl.sum", "tiles", True),
    "streamed: one step less": ("range(1, iterations)", "range(2, iterations)", "few steps, beta 1", True),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_the_contract_red(name, tmp_path, monkeypatch):
    old, new, case, is_streamed = MUTANTS[name]
    mutant = load_mutant(kernels, old, new, tmp_path)
    monkeypatch.setattr(launches, "_kernels", lambda: mutant)
    if is_streamed:
        monkeypatch.setattr(tile_sizes, "MOST_RESIDENT", 256)
    with pytest.raises(AssertionError):
        contract.verify(SPEC, CASES[case], torch.float32, "triton")
        pytest.fail("the contract stayed green", pytrace=False)
