"""vk.late_interaction_loss, impl="triton", interpreted with the tiles of sm_90: the contract, blocks, ties, bits, mutants."""

import dataclasses

import pytest
import torch

import vlkernels as vk
from tests.mutants import load_mutant
from tests.ops.test_contract import RawCalls
from vlkernels.core import triton_runtime
from vlkernels.core.spec import Case
from vlkernels.ops.late_interaction_loss import spec, tiles
from vlkernels.ops.late_interaction_loss.gpu import arithmetic, kernels, launches, tile_sizes, variants
from vlkernels.testing import contract

SPEC = dataclasses.replace(spec.SPECS[0], deterministic=False)  # programs take turns: two runs prove nothing
BOTH = pytest.mark.parametrize("similarity", ("mean_max", "max"))
SLOW = ("257 pairs, wide", "long samples", "63 pairs", "65 pairs, any two")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few samples, some of whose tiles are kept and some made again."""
    monkeypatch.setattr(arithmetic, "TILE_BYTES", 300)
    monkeypatch.setattr(tiles, "KEPT_BYTES", 3000)


@pytest.fixture
def launched(monkeypatch):
    """The launches that ran."""
    found, run = [], triton_runtime.Launch.run
    monkeypatch.setattr(triton_runtime.Launch, "run", lambda launch: (found.append(launch), run(launch))[0])
    return found


@pytest.mark.parametrize("dtype", SPEC.dtypes)
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_contract(case, dtype):
    if dtype == torch.bfloat16 or case.name not in SLOW:
        contract.verify(SPEC, case, dtype, "triton")


@BOTH
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_many_blocks(similarity, dtype, small_blocks, launched):
    case = Case("blocks", lambda fill: spec._ragged(fill, 13, 20, images=9, texts=6, similarity=similarity))
    contract.verify(SPEC, case, dtype, "triton")
    gradients = [launch for launch in launched if launch.kernel is kernels.gradient_kernel]
    assert len(launched) > 1.5 * len(gradients) > 20, "some tiles are made twice"


@pytest.mark.parametrize(
    "pairs, width, images, texts, dtype",
    (
        (2, 8, 60, 60, torch.float32),
        (3, 8, 150, 90, torch.float32),
        (5, 512, 60, 7, torch.bfloat16),
        (64, 64, 4, 3, torch.bfloat16),
        (3, 64, 200, 140, torch.bfloat16),
        (4, 16, 2, 130, torch.bfloat16),
    ),
)
def test_ragged_samples(pairs, width, images, texts, dtype):
    case = Case("ragged", lambda fill: spec._ragged(fill, pairs, width, images=images, texts=texts))
    contract.verify(SPEC, case, dtype, "triton")


@BOTH
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_the_first_of_equal_maxima_takes_the_gradient(similarity, dtype):
    contract.verify(SPEC, Case("integers", _integers(similarity)), dtype, "triton")


@BOTH
def test_value_without_gradients_is_the_same(similarity, small_blocks, launched):
    fill = contract.InputMaker(torch.float32)
    arguments = spec._ragged(fill, 9, 16, images=5, texts=4, similarity=similarity)
    with torch.no_grad():
        alone = vk.late_interaction_loss(**arguments, impl="triton")
    assert kernels.gradient_kernel not in {launch.kernel for launch in launched}
    assert torch.equal(alone, vk.late_interaction_loss(**arguments, impl="triton").detach())


def test_the_raw_op_keeps_its_schema():
    recorder = RawCalls()
    with recorder:
        arguments = spec.CASES[0].make(contract.InputMaker(torch.float32))
        vk.late_interaction_loss(**arguments, impl="triton").backward()
    for op, given in recorder.calls.items():
        torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))


def test_rows_of_nobody_are_not_read():
    arguments = next(c for c in SPEC.cases if c.name == "segments, padded").make(contract.InputMaker(torch.float32))
    mine = []
    for spoilt in (0.0, torch.nan):
        tokens = []
        for side in ("image", "text"):
            nobodys = arguments[f"{side}_layout"].token_sample() < 0
            tokens.append(arguments[f"{side}_tokens"].detach().masked_fill(nobodys[:, None], spoilt).requires_grad_())
        given = {**arguments, "image_tokens": tokens[0], "text_tokens": tokens[1]}
        mine.append(torch.autograd.grad(vk.late_interaction_loss(**given, impl="triton"), tokens))
    assert all(torch.equal(a, b) for a, b in zip(*mine))


@pytest.mark.parametrize("dtype", SPEC.dtypes)
def test_what_is_interpreted_is_what_sm_90_gets(dtype, launched):
    contract.run(vk.late_interaction_loss, SPEC.cases[0], dtype, impl="triton")
    contract.run(vk.late_interaction_loss, next(c for c in SPEC.cases if c.name == "queries"), dtype, impl="triton")
    for launch in launched:
        kernel = "gradient" if launch.kernel is kernels.gradient_kernel else "maxima"
        sizes = tile_sizes.tile_sizes(kernel, dtype, launch.constants["WIDTH"], 90)
        slots = [launch.constants[f"{side}_{part}"] for side in ("ROW", "COLUMN") for part in ("SLOT", "GROUP")]
        assert (slots[0] * slots[1], slots[2] * slots[3], launch.warps, launch.stages) == (*sizes[:2], *sizes[3:])
    assert {launch.kernel for launch in launched} == {kernels.mean_max_kernel, kernels.largest_kernel, kernels.gradient_kernel}


@pytest.mark.parametrize("architecture", (80, 90, 100))
def test_lengths_and_numbers_compile_nothing_anew(architecture):
    """What is compiled depends on the power of two that holds the longest sample, and on no other number."""
    options = {
        (kernel, str(launch.options), len(launch.arguments))
        for pairs, image, text in ((3, 49, 32), (700, 33, 17), (64, 60, 29))
        for kernel, launch in variants.launches(torch.bfloat16, 256, image, text, False, architecture, pairs).items()
    }
    assert len(options) == 2
    assert set(kernels.UNSPECIALIZED) >= {"row_samples", "column_samples", "row_count", "column_count"}


def test_float64_is_refused():
    with pytest.raises(ValueError, match='impl="triton": it computes in float32, the inputs are float64'):
        vk.late_interaction_loss(**SPEC.cases[0].make(contract.InputMaker(torch.float64)), impl="triton")
    assert launches.refusal({"dtype": torch.bfloat16}) is None


MUTANTS = {  # name: (old, new, the case that must notice)
    "the last of equal maxima": ("(LAST - place)", "place", "integers"),
    "packed values in another order": ("(bits >> 31) & 0x7FFFFFFF", "(bits >> 31) & 0", "integers"),
    "a later chunk that is only as good": ("here > best, chunk", "here >= best, chunk", "long integers"),
    "places within a chunk": ("chunk + place, found", "place, found", "long"),
    "only the first chunk of rows": ("return tl.max(lengths, 0)", "return SLOT", "long"),
    "padding that is another's token": ("rows = r_start + tl.minimum(r_place, r_length - 1)",
                                        "rows = r_start + tl.minimum(r_place, r_length)", "pairs"),
    "padding that counts": ("best = tl.where(held[None, :], best, 0.0)", "best = best", "pairs"),
    "padding that counts in rows": ("mine = tl.where(held[:, None], mine, 0.0)", "mine = mine", "pairs"),
    "means over the other side": ("by_row / i_length[:, None]", "by_row / j_length[None, :]", "pairs"),
    "tiles in another order": ("tl.program_id(0) % row_groups", "tl.program_id(0) // row_groups", "many"),
    "samples of the first group": ("j0 + column // COLUMN_SLOT", "column // COLUMN_SLOT", "many"),
    "places of the sample before": ("(r_offset + r_place)[:, None]\n                place",
                                    "r_place[:, None]\n                place", "pairs"),
    "any two: the last of equals": ("(here == largest) & (pair < first)", "(here == largest) & (pair > first)",
                                    "long integers, any two"),
    "any two: by the column first": ("<< PLACE_BITS) + c_place[None, :]",
                                     "<< 0) + (c_place.to(tl.int64) << PLACE_BITS)[None, :]", "integers, any two"),
    "a gradient without its gather": ("weights = tl.reshape(weights, [ROWS, COLUMNS])",
                                      "weights = 0 * tl.reshape(weights, [ROWS, COLUMNS])", "pairs"),
    "a gradient without its scatter": ("weights += tl.reshape(sent", "weights += 0 * tl.reshape(sent", "pairs"),
    "shares of the other side": ("weight = weight / r_length[:, None]", "weight = weight / 2", "pairs"),
    "the second slice of the width": ("% SLICES * SLICE", "% SLICES * 0", "wide"),
    "the second chunk of rows": ("part % row_chunks * ROW_SLOT", "part % row_chunks * 0", "long"),
    "the second chunk of columns": ("step % column_chunks * COLUMN_SLOT", "step % column_chunks * 0", "long"),
    "the unit of weights": ("total * (1.0 / UNIT)", "total", "small weights"),
    "a gradient that forgets": ("tl.load(pointers, mask=written, other=0.0) + total", "total", "blocks"),
    "any two: every token of a sample": ("tl.where(mine == r_place[:, None], weight, 0.0)", "weight", "integers, any two"),
}  # fmt: skip


def _integers(similarity, images=(9, 2, 1, 7, 8, 3), texts=(8, 1, 5, 4, 2, 6)):
    """Products are exact in every dtype, and most maxima are met several times, negative ones too."""

    def make(fill):
        arguments = spec._sides(fill, list(images), list(texts), 3, similarity=similarity, scale=0.5)
        for name in ("image_tokens", "text_tokens"):
            arguments[name] = ((4 * arguments[name].detach()).round().clamp(-1, 1) - 0.5).requires_grad_()
        return arguments

    return make


OWN_CASES = {
    "integers": _integers("mean_max"),
    "integers, any two": _integers("max"),
    "long integers": _integers("mean_max", (150, 3, 290), (140, 1, 20)),
    "long integers, any two": _integers("max", (150, 3, 290), (140, 1, 20)),
    "long": lambda fill: spec._sides(fill, [150, 3, 290], [140, 1, 20], 3),
    "many": lambda fill: spec._ragged(fill, 40, 16, images=9, texts=8),
    "blocks": lambda fill: spec._ragged(fill, 11, 16, images=5, texts=4),
    "pairs": SPEC.cases[0].make,
    "wide": lambda fill: spec._ragged(fill, 4, 300, images=9, texts=8),
    "small weights": lambda fill: spec._ragged(fill, 6, 16, images=9, texts=8),
}


@pytest.mark.parametrize("name", OWN_CASES)
def test_own_cases(name):
    contract.verify(SPEC, Case(name, OWN_CASES[name]), torch.float16, "triton")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_the_contract_red(name, tmp_path, monkeypatch, request):
    old, new, case = MUTANTS[name]
    if case == "blocks":
        request.getfixturevalue("small_blocks")
    mutant = load_mutant(kernels, old, new, tmp_path)
    monkeypatch.setattr(launches, "_kernels", lambda: mutant)
    with pytest.raises(AssertionError):
        contract.verify(SPEC, Case(case, OWN_CASES[case]), torch.float16, "triton")
        pytest.fail("the contract stayed green", pytrace=False)
