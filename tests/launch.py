"""Starts the ranks of a distributed test, and ends them whatever happens."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Finished:
    """Exit code and output of one rank."""

    code: int
    out: str
    err: str

    def result(self) -> dict:
        """The JSON a worker prints as its last line."""
        assert self.code == 0, f"exit code {self.code}\n{self.out[-2000:]}\n{self.err[-4000:]}"
        return json.loads(self.out.strip().splitlines()[-1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    command: list[str], world: int = 1, environment: dict | None = None, **options
) -> list[subprocess.Popen]:
    """One process per rank, each in a session of its own; a world of 1 starts as without a launcher."""
    port = free_port()
    processes = []
    for rank in range(world):
        launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        own = {name: value for name, value in os.environ.items() if name not in launched}
        own |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **(environment or {})}
        if world > 1:
            own |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={name: str(value) for name, value in own.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
        processes.append(process)
    return processes


def finish(processes: list[subprocess.Popen], timeout: float = 60) -> list[Finished]:
    """Wait for all of them together; kill the process groups of those that outlast the timeout."""
    deadline = time.monotonic() + timeout
    try:
        outputs = [p.communicate(timeout=max(0.1, deadline - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired as late:
        said = b"\n".join(part for part in (late.stdout, late.stderr) if part).decode(errors="replace")
        raise AssertionError(f"not over after {timeout} s: {said[-4000:]}") from late
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [Finished(p.returncode, out, err) for p, (out, err) in zip(processes, outputs, strict=True)]


def run(command: list[str], world: int = 1, timeout: float = 60, **options) -> list[Finished]:
    return finish(start(command, world, **options), timeout)
