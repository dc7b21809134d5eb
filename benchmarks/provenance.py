"""What a number was measured on: without it a number is a rumour."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import platform
import statistics
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SOURCES = ("benchmarks", "csrc", "vlkernels")
# What every row has, so that it may be shown; what a machine cannot tell (MAY_BE_UNKNOWN) is there as null.
REQUIRED = ("date", "commit", "modified", "python", "torch", "triton", "device", "arch")
REQUIRED_OF_A_PROCESSOR = ("threads",)
REQUIRED_OF_A_CARD = ("cuda", "cudnn", "driver, power limit, highest clock", "peers")
MAY_BE_UNKNOWN = ("commit", "modified", "triton", "cudnn", "driver, power limit, highest clock")
SOURCE_SINCE = "2026-11-20T17:18:31+00:00"  # required, too, of rows from then on
PEER_PACKAGES = (
    "apex",
    "cut-cross-entropy",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "flash-maxsim",
    "inf-cl",
    "late-interaction-kernels",
    "liger-kernel",
    "open_clip_torch",
    "quack-kernels",
    "siglip-kernel",
)


def provenance(device: str) -> dict[str, Any]:
    written = (":!benchmarks/results", ":!docs/SYSTEMS.md")  # by this very run
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", *written)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "modified": None if changes is None else bool(changes),
        "source": source_digest(),
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


def stored(name: str, device: str, heap: str | None, folder: Path = RESULTS) -> set[tuple[str, str]]:
    """``(benchmark, dtype)`` of the results that this very source, torch and Triton gave on such a device and heap."""
    path = folder / device_folder(device) / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    here = source_digest(), torch.__version__, _version("triton"), heap
    return {
        (row["benchmark"], row["dtype"])
        for row in rows
        if (row.get("source"), row["torch"], row["triton"], row.get("heap")) == here
    }


def lacking(row: Mapping[str, Any], on_card: bool) -> list[str]:
    """The fields of its provenance that a stored row does not have and could have."""
    required = [*REQUIRED, *(REQUIRED_OF_A_CARD if on_card else REQUIRED_OF_A_PROCESSOR)]
    if str(row.get("date")) >= SOURCE_SINCE:
        required.append("source")
    return [name for name in required if name not in row or (row[name] in (None, "") and name not in MAY_BE_UNKNOWN)]


def names_its_code(row: Mapping[str, Any]) -> bool:
    """A commit without changes does, and so does the digest of the source."""
    return "source" in row or (row["commit"] is not None and row["modified"] is False)


def device_folder(device: str) -> str:
    """The folder of ``benchmarks/results`` for this device: ``nvidia-h200`` or ``cpu-avx512``."""
    if device == "cuda":
        return torch.cuda.get_device_name(0).lower().replace(" ", "-")
    return f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}"


@functools.lru_cache(maxsize=1)
def source_digest() -> str:
    """Of the kernels and of what times them: names the source where there is no repository to ask."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.*")):
        if path.suffix in (".py", ".h", ".cuh", ".cpp", ".cu"):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class CardLog:
    """Clocks, power and temperature of the card while numbers are taken, read four times a second by nvidia-smi."""

    FIELDS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "power_w": "power.draw", "celsius": "temperature.gpu"}

    def __init__(self, command: Sequence[str] | None = None):
        self._command = command or (*_query(",".join(self.FIELDS.values())), "--loop-ms=250")
        self._lines: list[str] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> CardLog:
        try:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return self
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        return self

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self._lines.append(line)

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def take(self) -> dict[str, list[float]] | None:
        """Lowest, median and highest of each since the last ``take``; ``None`` when nothing was read."""
        lines, self._lines = self._lines, []
        readings = [r for r in map(_numbers, lines) if len(r) == len(self.FIELDS)]
        if not readings:
            return None
        return {name: [min(x), statistics.median(x), max(x)] for name, x in zip(self.FIELDS, zip(*readings))}


def _query(fields: str) -> tuple[str, ...]:
    card = f"--id={_uuid()}" if torch.cuda.is_available() else "--id=0"
    return "nvidia-smi", card, f"--query-gpu={fields}", "--format=csv,noheader,nounits"


def _uuid() -> str:
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


def _numbers(line: str) -> list[float]:
    try:
        return [float(x) for x in line.split(",")]
    except ValueError:
        return []


def _card() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver, power limit, highest clock": _limits(),
        "peers": {name: _version(name) for name in PEER_PACKAGES},
    }


@functools.lru_cache(maxsize=1)
def _limits() -> str | None:
    try:
        found = subprocess.run(_query("driver_version,power.limit,clocks.max.sm"), capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _processor() -> dict[str, Any]:
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    return {"device": model, "arch": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
