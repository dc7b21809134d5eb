"""Losses and draws over gloo ranks against one process on all pairs: values, gradients, bytes sent, memory, faults, errors."""

import contextlib
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import vlkernels as vk
from loss_cases import LOSSES, WAYS, WIDTH, Model, Pairs, Towers, over_tokens, value_and_gradients
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gloo_ranks import LIMIT, run_ranks
from tests.mutants import load_mutant
from vlkernels.core import exchange, pairs
from vlkernels.core.collectives import count_bytes
from vlkernels.ops.contrastive_loss import driver as contrastive
from vlkernels.ops.contrastive_loss import functional as contrastive_choice
from vlkernels.ops.contrastive_loss import torch_kernels as contrastive_kernels
from vlkernels.ops.late_interaction_loss import driver as late_interaction
from vlkernels.ops.late_interaction_loss import functional as late_interaction_choice
from vlkernels.ops.late_interaction_loss import tiles as late_interaction_tiles
from vlkernels.ops.late_interaction_loss import torch_kernels as late_interaction_kernels
from vlkernels.ops.sigmoid_loss import driver as sigmoid
from vlkernels.ops.sigmoid_loss import functional as sigmoid_choice
from vlkernels.ops.sigmoid_loss import torch_kernels as sigmoid_kernels
from vlkernels.ops.triplet_loss import driver as triplet
from vlkernels.ops.triplet_loss import functional as triplet_choice
from vlkernels.ops.triplet_loss import torch_kernels as triplet_kernels

COUNTS = {2: ((5, 5), (7, 3)), 3: ((4, 4, 4), (6, 0, 5)), 4: ((3, 3, 3, 3), (5, 0, 2, 4))}
REDUCTIONS = ("mean", "sum")
LARGE = (40, 24)  # rows and columns on every rank, more than the statistics of all ranks' rows
SHARE = 0.4  # of tokens that are sent
KINDS = ("contrastive", "sigmoid", "hardest", "filip")

# How often texts go around the ring, their gradients not counted; against keys, those of both sides once.
TRIPS = {"contrastive": 2, "sigmoid": 1, "hardest": 2, "summed": 1, "filip": 2, "blip-2": 2}
# Numbers gathered of every pair: features or keys, row statistics, similarities of partners; in the ring the last alone.
PARTNERS = {"hardest": 1, "summed": 1}
OTHERS = PARTNERS | {"contrastive": 2, "keys": 0, "sigmoid": 0}
GATHERED = {name: 2 * WIDTH + numbers for name, numbers in OTHERS.items()}

DRIVERS = (contrastive, sigmoid, triplet, late_interaction)
FAULTY_WORLD, FAULTY_LOSSES = 3, ("contrastive", "sigmoid")
MUTANTS = {
    "a gradient that does not travel": (exchange, "added = toward", "added = torch.zeros_like(toward)"),
    "a gradient that loses what came behind": (exchange, "toward += following", "pass"),
    "a gradient that does not come home": (exchange, "home += returned", "pass"),
    "blocks one hop off": (exchange, "self._empty(self._rank - hop - 1)", "self._empty(self._rank - hop - 2)"),
    "a last hop left out": (exchange, "for hop in range(world):", "for hop in range(world - 1):"),
    "a factor of a smaller world": (pairs, "return rows.world_size if", "return rows.world_size - 1 if"),
    "statistics of one rank": (contrastive, "    of_texts.over_ranks(rows)\n", ""),
}


def of_rank(rank, world, folder):
    small_tiles()
    group = dist.new_group(timeout=LIMIT)
    models = {"mean": DistributedDataParallel(Model(), find_unused_parameters=True), "sum": Model()}
    results = {"found": {}, "bytes": {}, "negatives": {}}
    for counts in COUNTS[world]:
        own = Pairs.drawn(sum(counts)).of_rank(counts, rank)
        over_ranks = {"group": group, "rank_counts": None if len(set(counts)) == 1 else counts}
        for name, reduction, way in product(LOSSES, REDUCTIONS, WAYS):
            key = str((counts, name, reduction, way))
            options = over_ranks | WAYS[way] | {"rank_reduction": reduction}
            with count_bytes() as sent:
                loss, gradients = value_and_gradients(name, models[reduction], own, **options)
            if reduction == "sum":
                for gradient in gradients:
                    dist.all_reduce(gradient)
            results["found"][key], results["bytes"][key] = (loss, gradients), dict(sent)
        drawn = [negatives(own, counts, rank, impl=impl, **over_ranks) for impl in ("torch", "reference")]
        results["negatives"][str(counts)] = drawn
    results["salient"] = {key: salient(key, rank, group) for key in product(COUNTS[world], ("gather", "ring", "reference"))}
    results["half"] = half_precision(rank, world, group)
    results["largest"] = {way: largest_tensors(way, group) for way in ("gather", "ring")}
    results["alone"] = alone(rank)
    results["errors"] = {name: errors(name, rank, world, group) for name in KINDS}
    if world == FAULTY_WORLD:
        results["faults"] = {fault: with_fault(fault, rank, world, group, Path(folder)) for fault in (None, *MUTANTS)}
    return results


def small_tiles():
    """Many tiles, some kept and some computed again; and sizes of ranks between which a single process changes its mind."""
    contrastive_kernels.TILE = sigmoid_kernels.TILE = triplet_kernels.TILE = 4
    contrastive_kernels.KEPT_TILES = 3
    late_interaction_kernels.TILE, late_interaction_tiles.KEPT_BYTES = 12, 700
    contrastive_choice.FEW_LOGITS[8], late_interaction_choice.FEW_PRODUCTS[8] = 20, 600
    for few in (sigmoid_choice.FEW_PAIRS, triplet_choice.FEW_PAIRS, triplet_choice.FEW_PAIRS_SUMMED):
        few[torch.float64] = 20


def negatives(own, counts, rank, **options):
    start = 100 + sum(counts[:rank])
    ids = torch.arange(start, start + counts[rank])
    with torch.no_grad():
        image, text, scale, _ = Model().towers(own.images, own.texts)
    return vk.hard_negatives(image, text, scale, labels=own.labels, rng=vk.Rng(7), stream=2, sample_ids=ids, **options)


def salient(key, rank, group):
    """Loss, summed gradients and bytes where a rank sends a share of its tokens."""
    counts, way = key
    own, towers = Pairs.drawn(sum(counts)).of_rank(counts, rank), Towers()
    with count_bytes() as sent:
        loss = over_tokens(token_share=SHARE)(towers, own, group=group, rank_counts=counts, rank_reduction="sum", **WAYS[way])
    loss.backward()
    gradients = [towers.image.grad, towers.text.grad, towers.scale.grad]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return loss.detach(), gradients, dict(sent)


def salient_in_one_process(counts):
    """Tokens chosen on every rank's share, one by one, and the loss of those alone."""
    towers, chosen = Towers(), ([], [])
    for rank in range(len(counts)):
        own = Pairs.drawn(sum(counts)).of_rank(counts, rank)
        if counts[rank] == 0:
            continue
        samples = [[F.normalize(t @ w, dim=1) for t in side] for side, w in own.encoded_by(towers)]
        products = torch.cat(samples[0]) @ torch.cat(samples[1]).T
        for side, best in enumerate((products.amax(1), products.amax(0))):
            scores = best.split([len(sample) for sample in samples[side]])
            for sample, score in zip(samples[side], scores):
                kept = score.argsort(descending=True)[: math.ceil(SHARE * len(sample))].sort().values
                chosen[side].append(sample[kept])
    layouts = {f"{name}_layout": vk.SegmentLayout([[len(s)] for s in side]) for name, side in zip(("image", "text"), chosen)}
    loss = vk.late_interaction_loss(*map(torch.cat, chosen), towers.scale.exp(), **layouts, impl="reference")
    return loss.detach(), torch.autograd.grad(loss, (towers.image, towers.text, towers.scale))


def half_precision(rank, world, group):
    """Values of bfloat16 features both ways, and the bytes of the ring."""
    counts = COUNTS[world][0]
    own = Pairs.drawn(sum(counts), torch.bfloat16).of_rank(counts, rank)
    found = {}
    for name, way in product(FAULTY_LOSSES, ("gather", "ring")):
        with count_bytes() as sent:
            loss, gradients = value_and_gradients(name, Model(torch.bfloat16), own, group=group, **WAYS[way])
        for gradient in gradients:
            dist.all_reduce(gradient)
        found[f"{name} {way}"] = loss, gradients, sent["ring"]
    return found


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def largest_tensors(way, group):
    """Of the losses over features, with their gradients, in numbers."""
    features, number = torch.randn(2, *LARGE), torch.tensor(2.0)
    over_ranks = (group.group_name, None, "mean", way, True)
    calls = {
        "contrastive": (contrastive_kernels.contrastive_loss, number, None, None, None, 0.0, 0.0),
        "sigmoid": (sigmoid_kernels.sigmoid_loss, number, number, None),
        "hardest": (triplet_kernels.triplet_loss, None, 0.2, True),
        "summed": (triplet_kernels.triplet_loss, None, 0.2, False),
    }
    found = {}
    for name, (loss, *rest) in calls.items():
        with LargestTensor() as largest:
            loss(*features, *rest, *over_ranks)
        found[name] = largest.numel
    return found


def alone(rank):
    """The ring of a group of one, and what ranks outside of a group are told."""
    group = dist.new_group([0])
    own = Pairs.drawn(5)
    if rank > 0:
        return error("contrastive", own, group=group)
    return {name: value_and_gradients(name, Model(), own, group=group, **WAYS["ring"]) for name in KINDS}


def errors(name, rank, world, group):
    """Of calls that are wrong on some ranks, and must end on all."""
    uneven, even = (Pairs.drawn(2 + own).of_rank((2 + own,), 0) for own in (rank, 0))
    wrong = [2] * world
    told = {
        "uneven": [error(name, uneven, group=group, **way) for way in WAYS.values()],
        "wrong": [error(name, uneven, group=group, rank_counts=wrong, **way) for way in WAYS.values()],
        "differing": error(name, even, group=group, rank_counts=[2] * (world - 1) + [2 + rank]),
    }
    told["options"] = error(name, even, group=group, exchange=("ring", "gather")[rank == 0], impl="torch")
    dtype = (torch.float32, torch.float64)[rank == 0]
    of_kind = Pairs.drawn(2, dtype)
    told["kinds"] = [error(name, of_kind, dtype, group=group, **way) for way in WAYS.values()]
    labelled = replace(even, labels=even.labels.to((torch.int32, torch.int64)[rank == 0]))
    told["labels"] = error("contrastive_labels", labelled, group=group)
    if name == "contrastive":
        longer = torch.ones(2 + 1 + rank, WIDTH, dtype=torch.float64)
        keys = {"image_keys": longer, "text_keys": longer}
        told["queue"] = [error("contrastive", even, group=group, **keys, **way) for way in WAYS.values()]
    if name != "filip":  # a layout without samples does not exist
        told["empty"] = [error(name, Pairs.drawn(0), group=group, **way) for way in WAYS.values()]
    return told


def error(name, own, dtype=torch.float64, **over_ranks):
    try:
        Model(dtype)(name, own, **over_ranks)
    except ValueError as raised:
        return str(raised)
    return "no error"


def with_fault(fault, rank, world, group, folder):
    counts = COUNTS[world][0]
    own = Pairs.drawn(sum(counts)).of_rank(counts, rank)
    module, *change = MUTANTS.get(fault, (exchange, "", ""))
    (folder / f"rank{rank}").mkdir(exist_ok=True)
    with planted(module, load_mutant(module, *change, folder / f"rank{rank}")):
        found = [value_and_gradients(name, Model(), own, group=group, **WAYS["ring"]) for name in FAULTY_LOSSES]
    for gradient in (gradient for _, gradients in found for gradient in gradients):
        dist.all_reduce(gradient)
        gradient /= world
    return found


@contextlib.contextmanager
def planted(module, mutant):
    """The mutant's functions and classes wherever drivers use the module's."""
    replaced = []
    for target in (*DRIVERS, pairs):
        for name, value in list(vars(target).items()):
            if callable(value) and getattr(value, "__module__", None) == module.__name__ and hasattr(mutant, name):
                replaced.append((target, name, value))
                setattr(target, name, getattr(mutant, name))
    yield
    for target, name, value in replaced:
        setattr(target, name, value)


@pytest.fixture(scope="module", params=sorted(COUNTS))
def ranks(request, tmp_path_factory):
    """What every rank of a gloo group of this size computed."""
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    return run_ranks(request.param, folder, of_rank, str(folder))


def scenarios(ranks):
    for counts, name in product(COUNTS[len(ranks)], LOSSES):
        expected = value_and_gradients(name, Model(), Pairs.drawn(sum(counts)), impl="reference")
        for reduction, way in product(REDUCTIONS, WAYS):
            yield str((counts, name, reduction, way)), *expected


def test_loss_is_that_of_one_process_and_equal_on_every_rank(ranks):
    for key, expected, _ in scenarios(ranks):
        losses = [result["found"][key][0] for result in ranks]
        torch.testing.assert_close(losses[0], expected, rtol=1e-12, atol=1e-12, msg=key)
        assert all(torch.equal(loss, losses[0]) for loss in losses), key


def test_reduced_parameter_gradients_are_those_of_one_process(ranks):
    """The mean is taken by DDP, the sum by a plain reduction."""
    for key, _, expected in scenarios(ranks):
        assert all(gradient.abs().max() > 1e-3 for gradient in expected[:2])
        for mine, true in zip(ranks[0]["found"][key][1], expected, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12, msg=key)


def test_a_share_of_tokens_is_chosen_before_anything_is_sent(ranks):
    for counts, way in product(COUNTS[len(ranks)], ("gather", "ring", "reference")):
        expected, true = salient_in_one_process(counts)
        for result in ranks:
            loss, gradients, sent = result["salient"][counts, way]
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
            torch.testing.assert_close(gradients, list(true), rtol=1e-10, atol=1e-12)
            if way != "reference":
                whole = result["bytes"][str((counts, "filip", "sum", way))]
                assert sum(sent.values()) < sum(whole.values())


def test_the_ring_sends_a_rank_s_share_of_texts_and_gradients(ranks):
    """A block passes every rank but the one it ends at; its gradient, which starts one rank later, ends at its owner."""
    world = len(ranks)
    for counts, (name, result), reduction in product(COUNTS[world], product(LOSSES, enumerate(ranks)), REDUCTIONS):
        rank, found = result
        tokens = name in ("filip", "blip-2")
        held = [text_tokens(counts, r) if tokens else counts[r] for r in range(world)]
        passed, added = sum(held) - held[(rank + 1) % world], sum(held) - held[rank]
        base = name.removesuffix("_labels")
        blocks = TRIPS[base] * passed + added if base in TRIPS else 2 * passed
        sent = found["bytes"][str((counts, name, reduction, "ring"))]
        assert sent["ring"] == blocks * WIDTH * 8, (counts, name, rank)
        if reduction == "mean":
            gathered = found["bytes"][str((counts, name, reduction, "gather"))]
            print(f"{name}, {counts} pairs, rank {rank}: ring {sent}, gather {gathered}")


def text_tokens(counts, rank):
    own = Pairs.drawn(sum(counts)).of_rank(counts, rank)
    return sum(map(len, own.text_tokens)) + own.spare


def test_a_gather_sends_a_rank_s_rows_to_every_other(ranks):
    """Padded to those of the longest rank; and the count of every rank with digests of all counts and of options."""
    world = len(ranks)
    for counts, name, way in product(COUNTS[world], LOSSES, ("gather", "ring")):
        base = "keys" if name == "distilled" else name.removesuffix("_labels")
        if base not in GATHERED:
            continue
        numbers = GATHERED[base] if way == "gather" else PARTNERS.get(base, 0)
        labels = max(counts) * (name.endswith("labels") or name == "distilled")
        expected = 8 * (world - 1) * (max(counts) * numbers + labels + 3)
        for result in ranks:
            sent = result["bytes"][str((counts, name, "mean", way))]
            assert sent["gather"] == expected, (counts, name, way)
            assert way == "ring" or "ring" not in sent


def test_half_types_travel_as_they_are(ranks):
    world = len(ranks)
    share = COUNTS[world][0][0] * WIDTH * (world - 1)
    for result, name in product(ranks, FAULTY_LOSSES):
        loss, gradients, _ = result["half"][f"{name} gather"]
        ring_loss, ring_gradients, sent = result["half"][f"{name} ring"]
        assert sent == share * (2 * TRIPS[name] + 4)
        torch.testing.assert_close(ring_loss, loss, rtol=1e-5, atol=0)
        for mine, other in zip(ring_gradients, gradients, strict=True):
            assert (mine - other).abs().max() <= 0.03 * other.abs().max()


def test_a_rank_holds_no_more_than_its_share_in_the_ring(ranks):
    rows, width = LARGE
    for result, name in product(ranks, ("contrastive", "sigmoid", "hardest", "summed")):
        assert result["largest"]["ring"][name] == rows * width, name
        assert result["largest"]["gather"][name] == len(ranks) * rows * width, name


def test_a_group_of_one_and_ranks_outside(ranks):
    for name in KINDS:
        loss, gradients = ranks[0]["alone"][name]
        expected, true = value_and_gradients(name, Model(), Pairs.drawn(5), impl="reference")
        torch.testing.assert_close([loss, *gradients], [expected, *true], rtol=1e-10, atol=1e-12)
    for outside in ranks[1:]:
        assert outside["alone"].startswith("group must be a torch.distributed process group that holds this rank, got")


def test_negatives_do_not_depend_on_the_ranks(ranks):
    for counts in COUNTS[len(ranks)]:
        total = sum(counts)
        expected = negatives(Pairs.drawn(total), (total,), 0, impl="reference")
        for impl, direction in product(range(2), range(2)):
            drawn = [result["negatives"][str(counts)][impl][direction] for result in ranks]
            assert torch.equal(torch.cat(drawn), expected[direction])


@pytest.mark.parametrize("name", KINDS)
def test_mistakes_of_some_ranks_are_one_clear_line_on_all(ranks, name):
    world = len(ranks)
    held = [2 + rank for rank in range(world)]
    for rank, result in enumerate(ranks):
        told = result["errors"][name]
        assert set(told["uneven"]) == {f"ranks hold {held} rows: pass rank_counts when they differ"}
        prefix = "rank_counts must be {} on every rank, the rows they have, got {}"
        assert set(told["wrong"]) == {prefix.format(held, [2] * world)}
        assert told["differing"] == prefix.format([2] * world, [2] * (world - 1) + [2 + rank])
        others = f"all ranks must call with the same options, rank {rank} has "
        given = f'exchange = "{"ring" if rank else "gather"}", requires_grad = True'
        assert told["options"].startswith(others) and given in told["options"]
        assert told["labels"].startswith("all ranks must call with the same options, rank")
        assert name != "contrastive" or all(
            line.startswith(others) and f"rows in the queue = {1 + rank}" in line for line in told["queue"]
        )
        kind = f" = float{64 if rank == 0 else 32}"
        assert all(line.startswith("all ranks must call") and kind in line for line in told["kinds"])
        nothing = "a batch must hold at least one pair, got N = 0 on every rank"
        assert set(told.get("empty", [nothing])) == {nothing}


@pytest.mark.parametrize("ranks", [FAULTY_WORLD], indirect=True)
@pytest.mark.parametrize("fault", [None, *MUTANTS])
def test_a_fault_is_seen(ranks, fault):
    counts = COUNTS[FAULTY_WORLD][0]
    right = True
    for name, (loss, gradients) in zip(FAULTY_LOSSES, ranks[0]["faults"][fault], strict=True):
        expected, true = value_and_gradients(name, Model(), Pairs.drawn(sum(counts)), impl="reference")
        found = zip([loss, *gradients], [expected, *true], strict=True)
        right = right and all(torch.allclose(mine, other, rtol=1e-9, atol=1e-11) for mine, other in found)
    assert right == (fault is None)
