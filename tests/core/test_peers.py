"""A peer that computes something else, in value or in gradient, is not timed."""

import pytest
import torch

from benchmarks import run
from vlkernels.core.peers import compiled, loaded, rival
from vlkernels.core.spec import Benchmark


def ours(x, w, dropout_p=0.0, impl="auto"):
    return torch.nn.functional.dropout(x * w, dropout_p), x.sum(0)


def arguments(**options):
    return {"x": torch.randn(6, 4, requires_grad=True), "w": torch.randn(4, requires_grad=True), **options}


def kept(x, w, dropout_p=0.0):
    return ours(x, w, dropout_p)


WRONG = {
    "one row": (lambda x, w: (x * w + torch.eye(6, 4)[:, :4] * 0.1, x.sum(0)), "its output 0 is off by"),
    "the second output": (lambda x, w: (x * w, 1.1 * x.sum(0)), "its output 1 is off by"),
    "outputs": (lambda x, w: x * w, "1 outputs, ours are 2"),
    "shape": (lambda x, w: ((x * w)[:5], x.sum(0)), r"its output 0 is \[5, 4\], ours \[6, 4\]"),
    "gradient": (lambda x, w: (x * w + w - w.detach(), x.sum(0)), "its gradient 1 is off by"),
    "missing gradient": (lambda x, w: (x * w.detach(), x.sum(0)), "gradient 1 is missing"),
    "not a number": (lambda x, w: (x * w * torch.nan, x.sum(0)), "its output 0 is off by nan"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_peer_that_computes_something_else_is_refused(wrong):
    function, reason = WRONG[wrong]
    with pytest.raises(ValueError, match=reason):
        rival(loaded(lambda: function), ours).prepare(**arguments())


def test_dropout_is_compared_without_and_timed_with():
    call, inputs = rival(loaded(lambda: kept), ours).prepare(**arguments(dropout_p=0.5))
    assert 4 < int((call()[0] == 0).sum()) < 20 and [t.shape for t in inputs] == [(6, 4), (4,)]
    with pytest.raises(ValueError, match="its output 0 is off by"):
        rival(loaded(lambda: lambda x, w, dropout_p: kept(x, 2 * w, dropout_p)), ours).prepare(**arguments(dropout_p=0.5))


def test_a_peer_that_writes_over_its_cotangent_is_refused():
    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy.mul_(2).div(2)

    with pytest.raises(ValueError, match="it writes over the gradient of its output"):
        rival(loaded(lambda: lambda x, w: (InPlace.apply(x * w), x.sum(0))), ours).prepare(**arguments())


def test_a_peer_may_have_parameters_of_its_own():
    def widened(given):
        return {**given, "w": given["w"].detach().double().requires_grad_()}

    call, inputs = rival(loaded(lambda: kept, widened), ours).prepare(**arguments())
    assert [t.dtype for t in inputs] == [torch.float32, torch.float64]
    assert all(g is not None for g in torch.autograd.grad([t.sum() for t in call()], inputs))


def test_more_shapes_than_a_compiler_keeps_are_compiled_each():
    frames = []

    def backend(graph, _):
        frames.append(graph)
        return graph.forward

    for rows in range(2, 14):
        x, w = torch.randn(rows, 4, requires_grad=True), torch.randn(4, requires_grad=True)
        rival(compiled(loaded(lambda: kept), backend), ours).prepare(x=x, w=w)
    assert len(frames) == 12


@pytest.mark.parametrize("error", (TypeError, AssertionError, ImportError))
def test_a_peer_may_fail_as_it_likes(error, capsys, tmp_path):
    def failing(**_):
        raise error("with these words\nand more")

    here = run.Run("cpu", 0.0, tmp_path)
    given = arguments()
    steps = run.variants(Benchmark(lambda _: given, peers={"theirs": rival(failing, ours)}, call=ours), given, here.tell_absent)
    assert list(steps) == ["vlkernels"] and here.absent == {"theirs": "with these words"}
    assert capsys.readouterr().out == "  theirs does not run here: with these words\n"
