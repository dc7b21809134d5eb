"""``vk.swap``: classes of live modules, and a report that says what happened."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import vlkernels as vk
from vlkernels.integrations.swap import unswap

CLASSES = {nn.LayerNorm: vk.FusedLayerNorm}


class OwnNorm(nn.LayerNorm):
    """A subclass that somebody else wrote."""


class NeedsMore(nn.LayerNorm):
    def __init__(self, width: int):
        super().__init__(width)
        self.more = nn.Parameter(torch.zeros(width))


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.LayerNorm(8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), OwnNorm(8)]
    return nn.Sequential(*layers).eval()


def test_values_gradients_and_state_are_the_same():
    plain, swapped = model(), model()
    report = vk.swap(swapped, CLASSES)
    assert [s.name for s in report.swapped] == ["1", "2.norm1", "2.norm2"]
    assert list(swapped.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 5, 8)
    with vk.recorded() as served:
        out = swapped(x)
    assert [op for op, _ in served].count("layer_norm") >= 1
    torch.testing.assert_close(out, plain(x))
    out.pow(3).sum().backward()
    plain(x).pow(3).sum().backward()
    for a, b in zip(swapped.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_parameters_hooks_and_optimizers_stay():
    network, seen = model(), []
    before = list(network.parameters())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network[1].register_forward_hook(lambda *_: seen.append(1))
    vk.swap(network, CLASSES)
    assert all(a is b for a, b in zip(before, network.parameters()))
    network(torch.randn(2, 5, 8)).pow(3).sum().backward()
    old = network[1].weight.clone()
    optimizer.step()
    assert seen == [1] and not torch.equal(old, network[1].weight)


def test_what_is_left_is_told_with_its_reason():
    network = model()
    network[2].norm1.forward = network[2].norm1.forward
    report = vk.swap(network, CLASSES)
    assert {left.name: left.reason for left in report.left} == {
        "2.norm1": "its forward was replaced on the instance: a new class would change nothing",
        "3": "it is a OwnNorm, a subclass of LayerNorm with ways of its own",
    }
    assert str(report) == (
        "swapped 2, left 2\n"
        "  2 x LayerNorm -> FusedLayerNorm\n"
        "  left LayerNorm (2.norm1): its forward was replaced on the instance: a new class would change nothing\n"
        "  left OwnNorm (3): it is a OwnNorm, a subclass of LayerNorm with ways of its own"
    )


def test_swapping_again_and_back():
    network = model()
    first, second = vk.swap(network, CLASSES), vk.swap(network, CLASSES)
    assert len(first.swapped) == 3 and not second.swapped
    assert {left.reason for left in second.left} >= {"it has its new class already"}
    assert unswap(network) == 3 and unswap(network) == 0
    assert type(network[1]) is nn.LayerNorm and vars(network[1]).keys() == vars(nn.LayerNorm(8)).keys()


def test_the_model_itself_can_be_swapped():
    norm = nn.LayerNorm(8)
    assert "1 x LayerNorm" in str(vk.swap(norm, CLASSES)) and type(norm) is vk.FusedLayerNorm


def test_nothing_to_swap():
    assert str(vk.swap(nn.Linear(2, 2), CLASSES)) == "swapped 0, left 0"


def test_swapped_models_are_copied_and_pickled():
    network, file = model(), io.BytesIO()
    vk.swap(network, CLASSES)
    torch.save(network, file)
    file.seek(0)
    for other in (copy.deepcopy(network), torch.load(file, weights_only=False)):
        assert type(other[1]) is vk.FusedLayerNorm and unswap(other) == 3


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({nn.LayerNorm: nn.RMSNorm}, "RMSNorm cannot replace LayerNorm: it must be a subclass of it"),
        ({nn.LayerNorm: nn.LayerNorm}, "LayerNorm cannot replace LayerNorm"),
        ({nn.LayerNorm: NeedsMore}, "NeedsMore cannot replace LayerNorm: its own __init__"),
        ({nn.LayerNorm: vk.layer_norm}, "got the new one <function layer_norm"),
        ({"LayerNorm": vk.FusedLayerNorm}, "got the old one 'LayerNorm'"),
    ],
)
def test_classes_that_cannot_take_over(classes, message):
    network = model()
    with pytest.raises(ValueError, match=message):
        vk.swap(network, classes)
    assert type(network[1]) is nn.LayerNorm


def test_what_is_no_model_and_no_mapping():
    with pytest.raises(ValueError, match="model must be a Module, got a str"):
        vk.swap("bert", CLASSES)
    with pytest.raises(ValueError, match="classes must be a Mapping, got a list"):
        vk.swap(model(), [nn.LayerNorm])


def test_a_compiled_model_runs_its_new_classes():
    graphs = []

    def noted(graph, _):
        graphs.append(str(graph.graph))
        return graph

    network, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(3, 8)
    compiled = torch.compile(network, backend=noted)
    compiled(x)
    vk.swap(compiled, CLASSES)
    compiled(x)
    assert ["vlkernels.layer_norm" in graph for graph in graphs] == [False, True]
