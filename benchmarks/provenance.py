"""What a number was measured on: without it a number is a rumour."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def provenance(device: str) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        **(_card() if device == "cuda" else _processor()),
    }


def store(name: str, row: dict[str, Any], device: str, folder: Path = RESULTS) -> None:
    """Append a result and its provenance to ``<folder>/<device>/<name>.jsonl``."""
    path = folder / device_folder(device) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**row, **provenance(device)}) + "\n")


def device_folder(device: str) -> str:
    """The folder of ``benchmarks/results`` for this device: ``nvidia-h200`` or ``cpu-avx512``."""
    if device == "cuda":
        return torch.cuda.get_device_name(0).lower().replace(" ", "-")
    return f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}"


def _card() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "cuda": torch.version.cuda,
        "clocks": _clocks(),
    }


def _clocks() -> dict[str, int] | None:
    try:
        import pynvml
    except ImportError:
        return None
    pynvml.nvmlInit()
    card = pynvml.nvmlDeviceGetHandleByIndex(0)
    return {
        "sm_mhz": pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM),
        "memory_mhz": pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_MEM),
        "power_w": pynvml.nvmlDeviceGetPowerUsage(card) // 1000,
    }


def _processor() -> dict[str, Any]:
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    return {"device": model, "arch": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _git(*arguments: str) -> str | None:
    found = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
