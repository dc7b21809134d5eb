"""Which network interface leads to the other hosts, and an end to waiting for ranks that never come."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import threading
from collections.abc import Iterator

FAMILIES = {socket.AF_INET: slice(4, 8), socket.AF_INET6: slice(8, 24)}
"""Where a socket address of Linux holds the bytes of its address."""


class InterfaceAddress(ctypes.Structure):
    """`struct ifaddrs` of getifaddrs(3), as far as it is read here."""


InterfaceAddress._fields_ = [
    ("next", ctypes.POINTER(InterfaceAddress)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def choose_interface() -> None:
    """Make gloo and NCCL talk through the interface that leads to MASTER_ADDR, where nobody has chosen one.

    Left alone, gloo advertises the address that the host name resolves to. On many machines that is
    127.0.0.1, and a rank on another host then fails or waits for ever.
    """
    try:
        own, family = own_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except OSError:  # unknown or out of reach: joining will say so
        return
    name = interface_of(own, family)
    if name is not None and name != "lo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without the sign NCCL takes it for a prefix


def own_address(host: str, port: int) -> tuple[str, socket.AddressFamily]:
    """The address this host would reach `host` from. Connecting a datagram socket sends nothing."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0], family


def interface_of(address: str, family: socket.AddressFamily) -> str | None:
    """The interface that has this address."""
    libc, first = ctypes.CDLL(None, use_errno=True), ctypes.POINTER(InterfaceAddress)()
    wanted = socket.inet_pton(family, address.partition("%")[0])
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        raise OSError(ctypes.get_errno(), "getifaddrs failed")
    try:
        entry = first
        while entry:
            if bytes_of(entry.contents.address, family) == wanted:
                return entry.contents.name.decode()
            entry = entry.contents.next
        return None
    finally:
        libc.freeifaddrs(first)


def bytes_of(socket_address: int | None, family: socket.AddressFamily) -> bytes | None:
    """The address in a `struct sockaddr` of this family; None for another family or none at all."""
    if socket_address is None or ctypes.c_ushort.from_address(socket_address).value != family:
        return None
    where = FAMILIES[family]
    return ctypes.string_at(socket_address + where.start, where.stop - where.start)


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End the process with one line when the block, or a failure inside it, means that ranks cannot meet.

    A timer, because torch's own timeout does not reach a rank that waits for gloo's connections.
    """
    timer = threading.Timer(seconds, give_up, [f"not within train.join_timeout = {seconds} s"])
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        give_up(str(error).splitlines()[0])
    finally:
        timer.cancel()


def give_up(reason: str) -> None:
    """Every rank speaks: the one that cannot be reached is seldom rank 0."""
    launched = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    rank, world, host, port = launched.values()
    through = os.environ.get("GLOO_SOCKET_IFNAME", "the default interface")
    print(
        f"pretrain: error: rank {rank} of {world} on {socket.gethostname()} could not meet the others at "
        f"{host}:{port} through {through}: {reason}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
