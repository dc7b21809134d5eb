"""Runs only where Triton's interpreter is on from the start: tests/test_interpreter.py starts such a process for each file."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from vlkernels.testing import interpreter

    interpreter.install()
