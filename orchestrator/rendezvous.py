"""The key-value store through which workers find each other.

The driver hosts it, not rank 0: it outlives every worker, so that a new process group can be formed after one of
them is gone. It listens on one address only.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class Rendezvous:
    """Where the store listens. A plain value, sent to every worker.

    Attributes:
        host, port: the driver's store.
        attempt: keeps the keys of one process group apart from those of the one before.
    """

    host: str
    port: int
    attempt: int = 0

    def connect(self) -> Store:
        """The store as this worker sees it."""
        store = TCPStore(self.host, self.port, is_master=False, wait_for_workers=False, timeout=TIMEOUT)
        return PrefixStore(f"attempt-{self.attempt}", store)


@contextlib.contextmanager
def host(address: str) -> Iterator[Rendezvous]:
    """A store that listens on `address` while the `with` block lasts."""
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        address, port, is_master=True, wait_for_workers=False, timeout=TIMEOUT, master_listen_fd=listener.detach()
    )
    try:
        yield Rendezvous(address, port)
    finally:
        del store
