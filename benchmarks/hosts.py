"""Hosts of a cluster on one machine: network namespaces, each with one link to a common bridge.

    with hosts(2, rate="1gbit") as cluster:
        subprocess.run(["ip", "netns", "exec", cluster[0].name, "ip", "addr"])

Needs root and iproute2, on Linux. Nothing is left behind, however the context ends, but by SIGKILL.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dml_accel.core.errors import UsageError

LINK = "eth0"  # of every host, in its namespace
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MASTER_PORT = 29500  # free: the namespace is ours


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        name: of its network namespace.
        address: of its link, IPv4.
    """

    name: str
    address: str


def launches(cluster: Sequence[Host], each: int = 1) -> list[dict[str, str]]:
    """Return the variables that ``torchrun`` would set, of each process by rank."""
    size = each * len(cluster)
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % each),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(each),
            "MASTER_ADDR": cluster[0].address,
            "MASTER_PORT": str(_MASTER_PORT),
            "GLOO_SOCKET_IFNAME": LINK,
        }
        for rank in range(size)
    ]


@contextlib.contextmanager
def hosts(count: int, rate: str | None = None, mtu: int = 1500) -> Iterator[list[Host]]:
    """Make hosts that reach each other, and remove them with all that runs on them.

    Args:
        count: how many.
        rate: of each link in each direction, as ``tc`` writes it (``100mbit``); None: unlimited.
        mtu: the longest packet of a link, in bytes.

    Raises:
        UsageError: this process is not root, or a program is missing.
    """
    check()
    tag = f"dml-{os.getpid()}-{time.monotonic_ns() % 10**6}"
    switch = f"{tag}-switch"
    cluster = [Host(f"{tag}-{place}", f"10.77.0.{place + 1}") for place in range(count)]
    with _signals_end_the_context():
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "bridge", "mtu", str(mtu), "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for place, host in enumerate(cluster):
                _connect(host, switch, f"port{place}", rate, mtu)
            yield cluster
        finally:
            with _signals_ignored():
                _remove([*(host.name for host in cluster), switch])


def check() -> None:
    """Refuse to start where no hosts can be made.

    Raises:
        UsageError: this process is not root, or a program is missing.
    """
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing or sys.platform != "linux":
        raise UsageError(
            f"hosts in network namespaces need {' and '.join(missing) or 'Linux'}: "
            "install iproute2, on Linux"
        )
    if os.geteuid():
        raise UsageError("only root can make network namespaces: run it with sudo")


def _connect(host: Host, switch: str, port: str, rate: str | None, mtu: int) -> None:
    """Make a host, and connect it to the bridge in the namespace ``switch``."""
    _ip("netns", "add", host.name)
    # One segment a packet: the counters of a link then count the headers that a wire would carry.
    size = ("mtu", str(mtu), "gso_max_segs", "1")
    there = ("peer", "name", port, "mtu", str(mtu), "netns", switch)
    _ip("-n", host.name, "link", "add", LINK, *size, "type", "veth", *there)
    _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
    _ip("-n", host.name, "addr", "add", f"{host.address}/16", "dev", LINK)
    for link in ("lo", LINK):
        _ip("-n", host.name, "link", "set", link, "up")
    if rate is not None:
        # Only two packets may go at once: what a step sends would otherwise fit into the burst.
        shape = ("rate", rate, "burst", str(2 * (mtu + 14)), "latency", "200ms")
        for name, link in ((host.name, LINK), (switch, port)):  # out and in
            _run("tc", "-n", name, "qdisc", "add", "dev", link, "root", "tbf", *shape)


def _remove(names: Sequence[str]) -> None:
    """Remove namespaces that exist, with their processes and links."""
    listed = _run("ip", "netns", "list").split()
    for name in (name for name in names if name in listed):
        while pids := _ip("netns", "pids", name).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        _ip("netns", "delete", name)


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def _signals_end_the_context() -> Iterator[None]:
    """Let signals that end a process raise SystemExit instead, so that contexts end in order."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    with _handling(leave):
        yield


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    with _handling(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handling(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only it can handle signals
        yield
        return
    before = {one: signal.signal(one, handler) for one in _SIGNALS}
    try:
        yield
    finally:
        for one, handled in before.items():
            signal.signal(one, handled)
