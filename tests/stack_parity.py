"""What parity tests of stacks share: ragged samples, redrawn parameters, and models of `transformers` kept in float64."""

import contextlib

import torch
import vlkernels as vk
from torch import nn
from torch.overrides import TorchFunctionMode

LENGTHS = [5, 1, 9, 3]
SOURCE_LENGTHS = [7, 2, 1, 4]
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


class InDouble(TorchFunctionMode):
    """Models round their norms and softmax to float32; here float64 stays what it is."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        doubled = arguments and isinstance(arguments[0], torch.Tensor) and arguments[0].dtype == torch.float64
        if doubled and function is torch.Tensor.float:
            return arguments[0]
        if doubled and function is torch.Tensor.to and arguments[1:] == (torch.float32,):
            return arguments[0]
        if doubled and options.get("dtype") == torch.float32:
            options = {**options, "dtype": torch.float64}
        return function(*arguments, **options)


def redraw(module: nn.Module, seed: int = 7) -> nn.Module:
    """In float64: default initialisation is blind to swapped norms and lost biases: matrices 0.25, vectors 0.5, nothing
    spared."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.25 if parameter.dim() == 2 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return module


def layout_of(lengths=LENGTHS) -> vk.SegmentLayout:
    return vk.SegmentLayout([[n] for n in lengths])


def visible(lengths=LENGTHS) -> torch.Tensor:
    """bool [B, L]: where a padded batch has tokens."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def ragged(padded: torch.Tensor, lengths=LENGTHS) -> torch.Tensor:
    return padded[visible(lengths)]


def padded_rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def copy_weights(ours: nn.Module, theirs: nn.Module, pieces) -> list:
    """Fill `ours`; every parameter of either side must be named exactly once."""
    pieces, parameters, saved = list(pieces), dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert sorted(piece.ours for piece in pieces) == sorted(parameters)
    assert sorted(name for piece in pieces for name in piece.theirs) == sorted(saved)
    with torch.no_grad():
        for piece in pieces:
            found = piece.read(saved)
            assert found.shape == parameters[piece.ours].shape, piece
            parameters[piece.ours].copy_(found)
            for name, tensor in piece.write(parameters[piece.ours]).items():
                assert torch.equal(tensor, saved[name]), name
    return pieces


def compare(ours: nn.Module, theirs: nn.Module, pieces, hidden, expected, inputs=()) -> None:
    """Outputs, the gradients of all parameters, and those of `inputs`, pairs of ours and theirs."""
    torch.testing.assert_close(hidden, expected, **TOLERANCE)
    upstream = torch.randn_like(expected)
    hidden.backward(upstream)
    expected.backward(upstream)
    parameters = dict(ours.named_parameters())
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for piece in pieces:
        wanted = piece.read(gradients)
        assert wanted.abs().max() > 1e-6, piece
        torch.testing.assert_close(parameters[piece.ours].grad, wanted, **TOLERANCE, msg=lambda m, p=piece: f"{p.ours}: {m}")
    for own, their in inputs:
        torch.testing.assert_close(own.grad, their.grad, **TOLERANCE)


@contextlib.contextmanager
def gradients_everywhere():
    """LayoutLMv2's module computes its biases without gradients."""
    kept, torch.no_grad = torch.no_grad, contextlib.nullcontext
    try:
        yield
    finally:
        torch.no_grad = kept


def named(ours: nn.Module, theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    """As "ours" and as "encoder", the names that the pieces of a stack are asked for by."""
    return nn.ModuleDict({"ours": ours}), nn.ModuleDict({"encoder": theirs})
