"""A network of its own for every node of a test's cluster: a namespace each, joined by a bridge whose links can be cut.

Needs root, and `ip` (iproute2). The head stays in the namespace of the test, at the bridge's address.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

PREFIX = "10.213.77"
HEAD = f"{PREFIX}.1"


class Network:
    """Addresses HEAD and, for every name in `addresses`, one in a namespace of its own."""

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self.addresses = addresses
        ip("link", "add", "lsbridge", "type", "bridge")
        ip("addr", "add", f"{HEAD}/24", "dev", "lsbridge")
        ip("link", "set", "lsbridge", "up")
        for address in addresses:
            name = namespace(address)
            ip("netns", "add", name)
            ip("link", "add", link(address), "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", link(address), "master", "lsbridge", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def enter(self, address: str) -> list[str]:
        """The words before a command that runs it on the node at `address`."""
        return ["ip", "netns", "exec", namespace(address)] if address in self.addresses else []

    def cut(self, address: str) -> None:
        """Nothing reaches the node and nothing leaves it; no connection is closed."""
        ip("link", "set", link(address), "down")

    def mend(self, address: str) -> None:
        ip("link", "set", link(address), "up")

    def close(self) -> None:
        for address in self.addresses:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", namespace(address))
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", "lsbridge")


@contextlib.contextmanager
def network(*addresses: str) -> Iterator[Network]:
    made = None
    try:
        made = Network(addresses)
        yield made
    finally:
        if made is not None:
            made.close()


def allowed() -> bool:
    """Whether namespaces can be made here."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        ip("netns", "add", "lsprobe")
        ip("netns", "del", "lsprobe")
    except subprocess.CalledProcessError:
        return False
    return True


def namespace(address: str) -> str:
    return f"lsnode{address.rpartition('.')[2]}"


def link(address: str) -> str:
    return f"lslink{address.rpartition('.')[2]}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
