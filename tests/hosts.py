"""Two hosts on one machine: each in namespaces of its own (network, processes, mounts, host name).

A host is the first process of its namespaces. The kernel ends it when the test run ends, however that ends,
and with it all processes, interfaces and mounts of the host.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch import ROOT, Finished, finish

NAMESPACES = ("--net", "--uts", "--pid", "--mount-proc", "--kill-child")
NEW_HOST = ("setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES)
TOOLS = ("ip", "nsenter", "setpriv", "unshare", "mount", "hostname")
INTERFACE = "ethx"
CHOSEN_BY_USERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def reason_to_skip() -> str | None:
    """Why this machine cannot hold two hosts; None where it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"two hosts need {', '.join(missing)}"
    pair = ("ip", "link", "add", "probe", "type", "veth", "peer", "name", "peer")
    allowed = subprocess.run([*NEW_HOST, *pair], capture_output=True).returncode == 0
    return None if allowed else "two hosts need root and the right to make network namespaces"


@dataclass
class Host:
    """One host by its address and its first process, numbered as outside."""

    address: str
    first_process: int

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self.first_process}", "--all", f"--wd={os.getcwd()}", *command]

    def do(self, *command: str) -> None:
        """A command that ends at once, and well."""
        subprocess.run(self.inside(*command), check=True, capture_output=True)

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        """A command of this Python's own folder."""
        own = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USERS}
        own |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment}
        own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.inside(*command), env=own, start_new_session=True, **pipes)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """10.77.0.1 and 10.77.0.2 on one wire. The name of each resolves to 127.0.0.1, as on many machines."""
    with one_host("10.77.0.1") as first, one_host("10.77.0.2") as second:
        wire = ("ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE)
        only_its_network = ("nsenter", f"--target={first.first_process}", "--net")
        subprocess.run([*only_its_network, *wire, "netns", str(second.first_process)], check=True)
        for host in (first, second):
            host.do("hostname", "localhost")
            host.do("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.do("ip", "link", "set", INTERFACE, "up")
            host.do("ip", "link", "set", "lo", "up")
        yield first, second


@contextlib.contextmanager
def one_host(address: str) -> Iterator[Host]:
    holder = subprocess.Popen([*NEW_HOST, "sleep", "infinity"])
    try:
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        while not (first_process := children.read_text().strip()):
            time.sleep(0.01)
        yield Host(address, int(first_process))
    finally:
        holder.kill()
        holder.wait()
        while Path(f"/proc/{first_process}").exists():  # the kernel ends the whole host first
            time.sleep(0.01)


def run_on_both(hosts: tuple[Host, Host], commands: list[list[str]], timeout: float = 150) -> list[Finished]:
    """One command on each host, at the same time; whatever outlasts the timeout is ended."""
    return finish([host.start(*command) for host, command in zip(hosts, commands, strict=True)], timeout)
