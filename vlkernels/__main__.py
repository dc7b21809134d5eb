"""`python -m vlkernels`: what runs on this machine and why.  `python -m vlkernels check [op ...]`: prove it here."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

from vlkernels import ops
from vlkernels.core import native
from vlkernels.core.spec import OpSpec
from vlkernels.testing import contract


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlkernels", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("report", "check"), default="report")
    parser.add_argument("ops", nargs="*", help="the ops to check; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(arguments)
    chosen = [spec for spec in ops.specs() if not options.ops or spec.name in options.ops]
    unknown = set(options.ops) - {spec.name for spec in chosen}
    if unknown:
        parser.error(f"no op named {', '.join(sorted(unknown))}; ops: {', '.join(s.name for s in ops.specs())}")
    if options.command == "check":
        return check(chosen, options.device)
    report(chosen)
    return 0


def report(specs: list[OpSpec]) -> None:
    print(f"python     {platform.python_version()} on {platform.machine()}")
    for package in ("torch", "triton", "deepspeed", "flash-attn"):
        print(f"{package:<10} {_version(package)}")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        print(f"device     {properties.name}, sm_{properties.major}{properties.minor}, CUDA {torch.version.cuda}")
    else:
        print(f"device     CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"compiled   {native.load() or _compiled()}\n")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for spec in specs:
            _report_op(spec, device)


def _report_op(spec: OpSpec, device: str) -> None:
    requested = "it serves on request"
    refusals = [(i.name, i.refusal_on(device) or (requested if device in i.on_request else None)) for i in spec.implementations]
    served = next(name for name, reason in refusals if reason is None)
    skipped = [f"{name}: {reason}" for name, reason in refusals[: [n for n, _ in refusals].index(served)]]
    print(f"{device:<5} {spec.name:<22} auto -> {served:<10} {'; '.join(skipped)}".rstrip())


def check(specs: list[OpSpec], device: str) -> int:
    """Run the contract of every implementation that serves here; 0 when all hold."""
    failures = 0
    for spec in specs:
        for dtype in spec.dtypes:
            for case in spec.cases:
                for impl in contract.implementations_here(spec, case, dtype, device):
                    try:
                        contract.verify(spec, case, dtype, impl, device)
                    except AssertionError as error:
                        failures += 1
                        print(f"FAILED  {error}")
        print(f"checked {spec.name} on {device}")
    print(f"{failures} failed")
    return 1 if failures else 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiled() -> str:
    info = native.build_info()
    cuda = f"CUDA {info['cuda_toolkit']} kernels for {info['cuda_architectures']}"
    return f"CPU kernels ({info['cpu_isa']}); {cuda if info['cuda_toolkit'] else 'no CUDA kernels: ' + info['cuda_missing']}"


if __name__ == "__main__":
    sys.exit(main())
