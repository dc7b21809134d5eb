"""The import table of docs/ARCHITECTURE.md holds in the tree."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vlkernels", "engine")


def floors() -> dict[str, list[set[str]]]:
    block = re.search(r"```floors\n(.*?)```", (ROOT / "docs/ARCHITECTURE.md").read_text(), re.S).group(1)
    table = {}
    for line in block.strip().splitlines():
        name, _, order = line.partition(":")
        table[name] = [{unit.strip() for unit in floor.split(",")} for floor in order.split("<")]
    return table


def rank(unit: str, order: list[set[str]]) -> int:
    for position, units in enumerate(order):
        if unit in units:
            return position
    raise AssertionError(f"{unit!r} stands on no floor of docs/ARCHITECTURE.md")


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def unit_of(parts: list[str]) -> str:
    return parts[0] if parts else "__init__"


def violations(package: str) -> list[str]:
    order, found = floors()[package], []
    for path in sources(package):
        own = unit_of(list(path.relative_to(ROOT / package).with_suffix("").parts))
        if package == "engine" and own == "__init__":
            continue
        for name in imports(path):
            if name.split(".")[0] != package:
                continue
            target = unit_of([p for p in name.split(".")[1:] if p])
            if not (ROOT / package / target).is_dir() and not (ROOT / package / f"{target}.py").exists():
                target = "__init__"
            if target == "__init__" and package == "engine":
                found.append(f"{path.relative_to(ROOT)} imports {name} from the package root")
            elif target != own and rank(target, order) >= rank(own, order):
                found.append(f"{path.relative_to(ROOT)} ({own}) imports {name} ({target})")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_downwards(package):
    assert violations(package) == []


def test_the_rule_can_fail(tmp_path, monkeypatch):
    bad = tmp_path / "vlkernels" / "core" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("from vlkernels.ops import packing\n")
    table = floors()
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "floors", lambda: table)
    assert len(violations("vlkernels")) == 1


def inner_violations() -> list[str]:
    table, found = floors(), []
    for path in sorted((ROOT / "vlkernels/ops").rglob("*.py")):
        own = path.relative_to(ROOT / "vlkernels/ops").with_suffix("").parts
        if len(own) < 2:
            continue
        for name in imports(path):
            parts = tuple(name.split(".")[2:])
            if name.split(".")[:2] != ["vlkernels", "ops"]:
                continue
            if len(parts) < 2 or parts[0] != own[0] or not points_down(own[1:], parts[1:], table):
                found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


def points_down(own: tuple[str, ...], target: tuple[str, ...], table: dict[str, list[set[str]]], floor: str = "op") -> bool:
    """Whether a file of an op may import ``target``: a lower unit, or in the folder of both by that folder's own line."""
    order = table[floor]
    if own[0] == target[0]:
        return len(own) == 1 or len(target) == 1 or points_down(own[1:], target[1:], table, f"{floor}/{own[0]}")
    known = {unit for units in order for unit in units}
    return own[0] not in known or target[0] not in known or rank(target[0], order) < rank(own[0], order)


def test_ops_import_no_sibling_and_keep_their_inner_order():
    assert inner_violations() == []


@pytest.mark.parametrize(
    "file, line, count",
    (
        ("attention/reference.py", "from vlkernels.ops.packing import pack", 1),
        ("attention/cpu/tiles.py", "from vlkernels.ops.attention.cpu.grouped import forward", 1),
        ("attention/cpu/tiles.py", "from vlkernels.ops.attention import functional", 1),
        ("attention/cpu/tiles.py", "from vlkernels.ops.attention.gpu.launches import forward", 1),
        ("attention/gpu/launches.py", "from vlkernels.ops.attention.gpu import work_list", 0),
        ("attention/functional.py", "from vlkernels.ops.attention.gpu import launches", 0),
    ),
)
def test_the_inner_rule_can_fail(tmp_path, monkeypatch, file, line, count):
    path, table = tmp_path / "vlkernels/ops" / file, floors()
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "floors", lambda: table)
    assert len(inner_violations()) == count


def data_violations() -> list[str]:
    """Of the folders of the engine's data, by their own line."""
    order, folder, found = floors()["engine/data"], ROOT / "engine/data", []
    for path in sorted(folder.rglob("*.py")):
        own = path.relative_to(folder).with_suffix("").parts[0]
        for name in imports(path):
            if name.startswith("engine.data."):
                target = name.split(".")[2]
                inside = (folder / target).is_dir()
                if not inside or (target != own and rank(target, order) >= rank(own, order)):
                    found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


def test_the_folders_of_data_import_downwards():
    assert data_violations() == []


@pytest.mark.parametrize(
    "file, line, count",
    (
        ("plan/order.py", "from engine.data.sources.load import load_source", 1),
        ("plan/order.py", "from engine.data import load_source", 1),
        ("sources/load.py", "from engine.data.plan.order import Plan", 0),
        ("sources/load.py", "from engine.data.sources import shards", 0),
    ),
)
def test_the_rule_of_data_can_fail(tmp_path, monkeypatch, file, line, count):
    path, table = tmp_path / "engine/data" / file, floors()
    for folder in ("plan", "sources"):
        (tmp_path / "engine/data" / folder).mkdir(parents=True)
    path.write_text(line + "\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "floors", lambda: table)
    assert len(data_violations()) == count


def test_vlkernels_imports_no_engine_and_host_libraries_only_lazily():
    for path in sources("vlkernels"):
        lazily = "integrations" in path.parts
        for name in imports(path, top_level_only=lazily):
            assert name.split(".")[0] not in ("engine", "deepspeed", "transformers", "open_clip"), f"{path}: {name}"


def test_the_engine_uses_public_names_only():
    import vlkernels as vk

    for path in sources("engine"):
        tree = ast.parse(path.read_text())
        for name in imports(path):
            assert not name.startswith("vlkernels."), f"{path}: {name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vk":
                assert node.attr in vk.__all__, f"{path}:{node.lineno}: vk.{node.attr} is not public"


def test_torch_headers_stand_in_the_binding_only():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cuh", ".cpp", ".cu") and "binding" not in path.parts:
            assert "#include <torch" not in path.read_text(), path


def test_c_sources_include_downwards():
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.suffix not in (".h", ".cuh", ".cpp", ".cu"):
            continue
        own = path.relative_to(ROOT / "csrc").parts[0]
        for target in re.findall(r'#include "([^"]+)"', path.read_text()):
            other = (path.parent / target).resolve()
            if not other.exists():
                other = ROOT / "csrc" / target
            assert other.exists(), f"{path}: {target} is not in csrc"
            unit = other.resolve().relative_to(ROOT / "csrc").parts[0]
            assert unit == own or unit == "primitives" or own in ("binding", "emulator"), f"{path} includes {target}"


def test_no_engine_file_bears_a_foreign_module_name():
    foreign = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    foreign -= {"engine", "vlkernels"}
    for path in sources("engine"):
        assert path.stem == "__init__" or path.stem not in foreign, path
        assert path.parent == ROOT / "engine" or path.parent.name not in foreign, path


def test_nothing_imports_tests_or_benchmarks():
    for package in PACKAGES:
        for path in sources(package):
            assert not any(name.split(".")[0] in ("tests", "benchmarks") for name in imports(path)), path
