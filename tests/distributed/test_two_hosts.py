"""Two hosts with their own networks, under DeepSpeed's launcher and torchrun: the curve of one process."""

import os
import socket
from pathlib import Path

import hosts
import pytest
from hosts import run_on_both, two_hosts
from launch import ROOT, Finished, finish, run
from shared_cache import shared_cache

from engine.training.network import choose_interface, interface_of
from engine.training.telemetry import read_metrics

SCRIPT = str(ROOT / "engine" / "pretrain.py")
RECIPE = str(ROOT / "engine" / "recipes" / "uniter_base.yaml")
__all__ = ["shared_cache"]


@pytest.fixture(scope="module")
def pair():
    if reason := hosts.reason_to_skip():
        pytest.skip(reason)
    with two_hosts() as pair:
        yield pair


def options(output: Path, cache: Path, *more: str) -> list[str]:
    """Three steps of three tasks."""
    where = [f"--output={output}", f"--data.cache={cache}", "--device=cpu", "--precision=fp32"]
    small = ["--tiny=true", "--data.max_records=64", "--evaluation.gallery=16", "--seed=29"]
    return ["--config", RECIPE, *where, *small, "--train.max_steps=3", "--train.log_every=1", *more]


def deepspeed(pair, folder: Path) -> list[list[str]]:
    """The command of each host."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.address} slots=1\n" for host in pair))
    every = ["--hostfile", str(hostfile), "--master_addr", pair[0].address, "--master_port", "29777"]
    return [["deepspeed", *every, "--no_ssh", "--node_rank", str(rank), SCRIPT] for rank in (0, 1)]


def torchrun(pair, folder: Path) -> list[list[str]]:
    """The command of each host."""
    every = ["--nnodes=2", "--nproc_per_node=1", f"--master_addr={pair[0].address}", "--master_port=29778"]
    return [["torchrun", *every, f"--node_rank={rank}", SCRIPT] for rank in (0, 1)]


def curve(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "uniter_base" / "metrics.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, shared_cache) -> list[float]:
    output = tmp_path_factory.mktemp("alone")
    (finished,) = run([SCRIPT, *options(output, shared_cache)], timeout=120)
    assert finished.code == 0, finished.err
    return curve(output)


@pytest.mark.parametrize(("launcher", "stage"), [(deepspeed, 1), (torchrun, 3)])
def test_two_hosts_learn_as_one_process(tmp_path, pair, shared_cache, alone, launcher, stage):
    arguments = options(tmp_path, shared_cache, f"--zero.stage={stage}")
    for finished in run_on_both(pair, [[*command, *arguments] for command in launcher(pair, tmp_path)]):
        assert finished.code == 0, finished.err
    assert len(alone) == 3 and curve(tmp_path) == pytest.approx(alone, rel=1e-4)


def launched(rank: int, master: str, port: int) -> dict[str, str]:
    """What a launcher tells one of two processes on two hosts."""
    numbers = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_SIZE": 1, "MASTER_PORT": port}
    return {"MASTER_ADDR": master, **{name: str(value) for name, value in numbers.items()}}


def own_lines(finished: Finished) -> list[str]:
    """What it said on stderr, without torch's warnings about sockets."""
    return [line for line in finished.err.splitlines() if not line.startswith("[W")]


def test_ranks_that_never_come_end_in_one_line(tmp_path, pair, shared_cache):
    """Rank 0 waits for a rank 1 that is not started; rank 1 asks a host where nobody answers."""
    command = ["python", SCRIPT, *options(tmp_path, shared_cache, "--train.join_timeout=3")]
    first, second = pair
    waiting = first.start(*command, **launched(0, first.address, 29779))
    asking = second.start(*command, **launched(1, first.address, 29780))
    for rank, finished in enumerate(finish([waiting, asking])):
        assert finished.code == 1
        assert own_lines(finished) == [
            f"pretrain: error: rank {rank} of 2 on localhost could not meet the others at {first.address}:"
            f"{29779 + rank} through {hosts.INTERFACE}: not within train.join_timeout = 3 s"
        ]


def test_a_run_folder_that_one_host_does_not_see_is_one_line(tmp_path, pair, shared_cache):
    first, second = pair
    second.do("mount", "-t", "tmpfs", "none", str(tmp_path))
    command = ["python", SCRIPT, *options(tmp_path, shared_cache)]
    ranks = [host.start(*command, **launched(rank, first.address, 29781)) for rank, host in enumerate(pair)]
    main, other = finish(ranks)
    assert (main.code, other.code) == (2, 2)
    assert own_lines(other) == [] and own_lines(main) == [
        f"pretrain: error: the run folder {tmp_path}/uniter_base that rank 0 made is not there for rank 1 on "
        "localhost: output must name a folder that all hosts share"
    ]


@pytest.mark.parametrize(
    ("chosen", "expected"), [({}, "ethx =ethx"), ({"GLOO_SOCKET_IFNAME": "lo"}, "lo =ethx")]
)
def test_the_interface_that_leads_to_the_master_is_used(pair, chosen, expected):
    script = (
        "import os\nfrom engine.training.network import choose_interface\nchoose_interface()\n"
        "print(os.environ['GLOO_SOCKET_IFNAME'], os.environ['NCCL_SOCKET_IFNAME'])"
    )
    for host in pair:
        variables = launched(0, pair[0].address, 1) | chosen
        (finished,) = finish([host.start("python", "-c", script, **variables)])
        assert finished.out == f"{expected}\n", finished.err


def test_a_master_on_this_host_alone_chooses_no_interface(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    for master in ("127.0.0.1", "localhost", "::1", "no-such-host.invalid"):
        monkeypatch.setenv("MASTER_ADDR", master)
        choose_interface()
        assert "GLOO_SOCKET_IFNAME" not in os.environ and "NCCL_SOCKET_IFNAME" not in os.environ


def test_addresses_of_both_families_have_an_interface():
    assert interface_of("127.0.0.1", socket.AF_INET) == "lo"
    assert interface_of("203.0.113.7", socket.AF_INET) is None
    if Path("/proc/net/if_inet6").exists() and "lo" in Path("/proc/net/if_inet6").read_text():
        assert interface_of("::1", socket.AF_INET6) == "lo"
