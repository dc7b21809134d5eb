"""The tests of the CUDA kernels once more, under AddressSanitizer and UndefinedBehaviorSanitizer."""

import subprocess
import sys
import textwrap

from tests import emulated


def run(*command):
    environment = emulated.sanitized_environment()
    return subprocess.run(
        [sys.executable, *command], cwd=emulated.ROOT, env=environment, capture_output=True, text=True
    )


def assert_clean(file, chosen):
    found = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, f"tests/emulator/{file}")
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    assert " passed" in found.stdout and "skipped" not in found.stdout


def test_layer_norm_is_clean():
    """Every kind of kernel: rows of one warp, of several and not held; with and without vectors."""
    chosen = "contract and not dtype2 or 768-dtype1 or 770-dtype0 or 4100-dtype1 or boundary and dtype1"
    assert_clean("test_layer_norm_cuda.py", chosen)


def test_packing_is_clean():
    """Every width of an access, rows of less than a warp and of more, repeated positions, and layouts that lie."""
    assert_clean("test_packing_cuda.py", "(any_dtype and trailing4) or boundary or any_layout or repeated or means_of or lies")


def test_patchify_is_clean():
    """Every width of an access, of pixels and of bytes, off their boundaries too; sizes that lie."""
    assert_clean("test_patchify_cuda.py", "(every_width and dtype1) or (contract and dtype0) or lie")


def test_embed_layer_norm_is_clean():
    """Rows of one warp, of several and not held; with and without vectors; ids that fill chunks and that do not."""
    chosen = "(contract and uniter) or 768-dtype1 or 770-dtype0 or 4100-dtype1 or boundary or (sum_of_its and 700)"
    assert_clean("test_embed_layer_norm_cuda.py", chosen)


SCRIPT = """
    import torch
    from pathlib import Path
    from tests import emulated
    kernels = emulated.module(Path("tests/emulator/emulator_kernels.cpp").resolve())
    memory = torch.zeros(2)
    kernels.fill_shared(10, 10, memory.data_ptr())
    print("so far so good", flush=True)
    kernels.fill_shared(10, {floats}, memory.data_ptr() + {shift})
"""


def test_what_lies_outside_is_seen():
    found = run("-c", textwrap.dedent(SCRIPT.format(floats=11, shift=0)))
    assert "so far so good" in found.stdout
    assert found.returncode != 0 and "heap-buffer-overflow" in found.stderr


def test_what_lies_on_no_boundary_is_seen():
    found = run("-c", textwrap.dedent(SCRIPT.format(floats=10, shift=2)))
    assert "so far so good" in found.stdout
    assert found.returncode != 0 and "misaligned address" in found.stderr
