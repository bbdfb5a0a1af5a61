"""Two hosts on one machine: network namespaces of Linux with a virtual cable between them. Root alone may make them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A network namespace.

    Args:
        name: of the namespace.
        interface: its end of the cable.
        address: of that end.
    """

    name: str
    interface: str
    address: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """What runs a command on this host."""
        return ["ip", "netns", "exec", self.name, *arguments]


def why_no_hosts() -> str | None:
    """Why this machine permits no network namespaces; None where it does."""
    if shutil.which("ip") is None:
        return "there is no command ip (package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with _namespace(f"pkmem-{os.getpid()}-try"):
            return None
    except subprocess.CalledProcessError as error:
        return f"ip netns add failed: {error.stderr.strip()}"


@contextlib.contextmanager
def one_host() -> Iterator[Host]:
    """A host with nobody but itself to talk to, whose interface counts all that its processes tell each other."""
    with _namespace(f"pkmem-{os.getpid()}") as name:
        yield Host(name, "lo", "127.0.0.1")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that can talk to each other, until `cut`."""
    with _namespace(f"pkmem-{os.getpid()}-0") as first, _namespace(f"pkmem-{os.getpid()}-1") as second:
        hosts = Host(first, "pkmem0", "10.99.0.1"), Host(second, "pkmem1", "10.99.0.2")
        _ip("-n", first, "link", "add", "pkmem0", "type", "veth", "peer", "name", "pkmem1", "netns", second)
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", host.interface, "up")
        yield hosts


def cut(host: Host) -> None:
    """Takes the cable away at this end: from now on no message comes or goes, and nobody is told."""
    _ip("-n", host.name, "link", "set", host.interface, "down")


def join(host: Host) -> None:
    """Puts the cable back."""
    _ip("-n", host.name, "link", "set", host.interface, "up")


@contextlib.contextmanager
def _namespace(name: str) -> Iterator[str]:
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
