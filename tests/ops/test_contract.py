"""Every op, case, dtype and implementation against the reference; and proof that this test can fail."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vlkernels import ops
from vlkernels.core import native
from vlkernels.core.spec import InputMaker
from vlkernels.testing import contract, faults, sync_lint
from vlkernels.testing.arguments import cotangents, differentiable_tensors, floating_outputs

SPECS = {spec.name: spec for spec in ops.specs()}
CASES = [(spec.name, case.name) for spec in SPECS.values() for case in spec.cases]
CALLS = [
    (spec.name, case.name, dtype, implementation.name)
    for spec in SPECS.values()
    for case in spec.cases
    for dtype in spec.dtypes
    for implementation in spec.implementations
    if implementation.name != "reference"
]


def case_of(spec_name, case_name):
    return next(case for case in SPECS[spec_name].cases if case.name == case_name)


def verify_on(device, op, case_name, dtype, impl):
    spec, case = SPECS[op], case_of(op, case_name)
    if impl not in contract.implementations_here(spec, case, dtype, device):
        pytest.skip(f"{impl} does not serve this case on {device}")
    contract.verify(spec, case, dtype, impl, device)


@pytest.mark.parametrize("op, case_name, dtype, impl", CALLS)
def test_contract(op, case_name, dtype, impl):
    verify_on("cpu", op, case_name, dtype, impl)


@pytest.mark.gpu
@pytest.mark.parametrize("op, case_name, dtype, impl", CALLS)
def test_contract_on_the_card(op, case_name, dtype, impl):
    verify_on("cuda", op, case_name, dtype, impl)


@pytest.mark.gpu
@pytest.mark.parametrize("op, case_name", CASES)
def test_reference_on_the_card_is_the_reference(op, case_name):
    spec, case = SPECS[op], case_of(op, case_name)
    truth, eager = (contract.run(spec.reference, case, dtype) for dtype in (torch.float64, torch.float32))
    actual = contract.run(spec.functional, case, torch.float32, "cuda", impl="reference")
    contract.compare(f"{op}/{case_name}/reference on the card", actual, eager, truth)


@pytest.mark.parametrize("op, case_name", CASES)
def test_reference_passes_gradcheck(op, case_name):
    spec, case = SPECS[op], case_of(op, case_name)
    arguments = case.make(InputMaker(torch.float64))
    inputs = differentiable_tensors(arguments)
    outputs = floating_outputs(spec.reference(**arguments))
    if not inputs or not any(t.requires_grad for t in outputs):
        pytest.skip("nothing to differentiate")
    definition = spec.reference
    if spec.held is not None:
        definition = spec.held(**arguments)
        contract.compare("held", *[contract.run(f, case, torch.float64) for f in (spec.reference, definition, definition)])

    def function(*tensors):
        fresh = case.make(InputMaker(torch.float64))
        replaced = {name: t for name, t in zip(inputs, tensors)}
        return tuple(t for t in floating_outputs(definition(**_replace(fresh, replaced))) if t.requires_grad)

    detached = tuple(t.detach().clone().requires_grad_() for t in inputs.values())  # one tensor may be given twice
    assert torch.autograd.gradcheck(function, detached, fast_mode=True, masked=False, atol=1e-6)


def _replace(arguments, tensors):
    for path, tensor in tensors.items():
        name, _, index = path.partition("[")
        name, _, inner = name.partition(".")
        if inner:  # a table of a bias, which is made of all of them
            following = iter([t for p, t in tensors.items() if p.startswith(f"{name}.")])
            arguments[name] = arguments[name]._with_tensors(lambda t: next(following) if t.is_floating_point() else t)
        elif index:
            items = list(arguments[name])
            items[int(index[:-1])] = tensor
            arguments[name] = type(arguments[name])(items)
        else:
            arguments[name] = tensor
    return arguments


class RawCalls(TorchDispatchMode):
    """Collects the first call of every raw op."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vlkernels" and func not in self.calls:
            self.calls[func] = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", SPECS)
def test_opcheck(op):
    spec, recorder = SPECS[op], RawCalls()
    for case in spec.cases:
        for impl in contract.implementations_here(spec, case, torch.float32):
            with recorder:
                arguments = case.make(InputMaker(torch.float32))
                outputs = [t for t in floating_outputs(spec.functional(**arguments, impl=impl)) if t.requires_grad]
                if outputs:
                    inputs = list(differentiable_tensors(arguments).values())
                    torch.autograd.grad(outputs, inputs, cotangents(outputs), allow_unused=True)
    if not recorder.calls and native.load() is not None:
        pytest.skip(f"{op} has no kernel without the compiled library")
    assert recorder.calls, f"{op} reached no raw op"
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for func, args in recorder.calls.items():
        backward = func._schema.name.endswith("backward")
        floating = () if backward else _float_leaves(args)
        for tensor in floating:
            tensor.requires_grad_()
        torch.library.opcheck(func, args, test_utils=tests[:3] if backward else tests)


def _float_leaves(args):
    flat = [a for argument in args for a in (argument if isinstance(argument, (list, tuple)) else (argument,))]
    return [t for t in flat if isinstance(t, torch.Tensor) and t.is_floating_point()]


@pytest.mark.parametrize("op", SPECS)
def test_a_seeded_fault_turns_the_contract_red(op):
    spec = SPECS[op]
    case = next((c for c in spec.cases if contract.implementations_here(spec, c, torch.float32)), None)
    if case is None:
        pytest.skip("nothing but the reference serves here")
    impl = contract.implementations_here(spec, case, torch.float32)[0]
    seeded = list(faults.seeded(spec, case, torch.float32))
    assert seeded
    for name, faulty in seeded:
        with pytest.raises(AssertionError):
            contract.verify(spec, case, torch.float32, impl, functional=faulty)
            pytest.fail(f"the contract of {op} stayed green with a wrong {name}", pytrace=False)


@pytest.mark.parametrize("op, case_name", CASES)
def test_no_hidden_sync(op, case_name):
    sync_lint.lint(SPECS[op].functional, case_of(op, case_name))


@pytest.mark.parametrize("op", SPECS)
def test_unknown_implementations_are_named(op):
    spec = SPECS[op]
    with pytest.raises(ValueError, match='impl must be "auto" or one of .*got "fastest"'):
        spec.functional(**spec.cases[0].make(InputMaker(torch.float32)), impl="fastest")
