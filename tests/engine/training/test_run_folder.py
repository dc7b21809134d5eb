"""Two runs never write into one folder."""

import subprocess
import sys

import pytest

from engine.training.run_folder import hold

HOLDER = """
import sys
from pathlib import Path
from engine.training.run_folder import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
input()
"""


def test_a_folder_is_held_by_one_process_while_it_lives(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    try:
        with pytest.raises(ValueError, match=rf"^{tmp_path} is in use by process {other.pid} on .+: wait"):
            hold(tmp_path)
    finally:
        other.kill()
        other.communicate()
    hold(tmp_path)
    hold(tmp_path)  # the next run of the same process
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    tmp_path.mkdir()
    hold(tmp_path)
    found = subprocess.run([sys.executable, "-c", HOLDER, moved], capture_output=True, text=True)
    assert "is in use by process" in found.stderr
