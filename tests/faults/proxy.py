"""A TCP proxy that fails on request: in front of a store or a tracker, or as the link between two nodes.

    with FaultProxy(("127.0.0.1", 5000)) as proxy:
        ...                              # everything passes, byte for byte, at proxy.url
        proxy.throttle(times=3)          # the next three HTTP requests are answered with 503 SlowDown
        proxy.drop(after=1000)           # connections are reset after so many bytes, until healed
        proxy.heal()

What is behind it stays real and never learns of the fault. `faults` counts how often one has struck.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Literal, Self

CHUNK = 1 << 16
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class Fault:
    """`amount`: seconds of delay, or bytes before a drop. `left`: how often it strikes yet; None: until healed.

    `lasts`: seconds from the first time that it strikes until it is healed. `rate`: bytes a second, all connections
    and both directions together.
    """

    kind: Literal["none", "refuse", "delay", "throttle", "drop", "hang", "slow"] = "none"
    amount: float = 0.0
    left: int | None = None
    lasts: float | None = None
    rate: float = math.inf


class FaultProxy:
    """Passes connections to `upstream` (host, port) on; a port of its own at `host`."""

    def __init__(self, upstream: tuple[str, int], host: str = "127.0.0.1") -> None:
        self.upstream, self.host = upstream, host
        self.faults = 0
        self._fault = Fault()
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._asked: set[socket.socket] = set()  # connections to upstream with a request and no answer yet
        self._free_at = 0.0  # when a slow link has passed what it was given
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._listen()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def refuse(self) -> None:
        """Nobody listens; connections that are open are reset."""
        self._set(Fault("refuse"))
        # shutdown wakes the thread that accepts; a close alone would leave the port listening until it returns
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._reset_all()

    def delay(self, seconds: float, lasts: float | None = None) -> None:
        """Every piece of an answer comes so much later; from the first one on for `lasts` seconds."""
        self._set(Fault("delay", seconds, lasts=lasts))

    def slow(self, rate: float, latency: float) -> None:
        """So many bytes pass in a second, to and fro together, and every answer begins so many seconds later."""
        self._set(Fault("slow", latency, rate=rate))

    def throttle(self, times: int | None = None) -> None:
        """HTTP requests are answered with 503 SlowDown."""
        self._set(Fault("throttle", left=times))
        self._reset_all()  # what is kept open has a request under way that cannot be answered in its place

    def drop(self, after: int, times: int | None = None) -> None:
        """Connections are reset once so many bytes have gone through them, to or fro."""
        self._set(Fault("drop", after, times))

    def hang(self, lasts: float | None = None) -> None:
        """Nothing passes and nothing is closed, as over a link that is cut; what was sent arrives once it is healed.

        That is `lasts` seconds after something was to pass.
        """
        self._set(Fault("hang", lasts=lasts))

    def heal(self) -> None:
        """Everything passes again."""
        refused = self._fault.kind == "refuse"
        self._set(Fault())
        if refused:
            self._listener = socket.create_server((self.host, self.port))
            self._listen()

    def heal_after(self, seconds: float) -> None:
        """Heals the fault that is now, unless another one, or none, has come in its place by then."""
        fault = self._fault
        timer = threading.Timer(seconds, lambda: self._fault is fault and self.heal())
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        self.heal()
        self.refuse()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set(self, fault: Fault) -> None:
        with self._changed:
            self._fault = fault
            self._changed.notify_all()

    def _strike(self) -> bool:
        """Whether the fault strikes this time; counts it, and heals after the last time."""
        with self._changed:
            if self._fault.left == 0:
                self._fault = Fault()
                return False
            if self._fault.left is not None:
                self._fault.left -= 1
            if self._fault.lasts is not None:
                self.heal_after(self._fault.lasts)
                self._fault.lasts = None
            self.faults += 1
            return True

    def _listen(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._open.add(client)
        if self._fault.kind == "throttle" and self._strike():
            with contextlib.suppress(OSError, ValueError):
                _answer_503(client)
            self._close(client)
            return
        try:
            server = socket.create_connection(self.upstream)
        except OSError:
            self._close(client, reset=True)
            return
        self._open.add(server)
        threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
        self._pump(server, client, True)

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        passed, server = 0, source if answers else target
        try:
            while block := source.recv(CHUNK):
                fault, begins = self._fault, answers and server in self._asked
                (self._asked.discard if answers else self._asked.add)(server)
                if fault.kind == "hang":
                    self._strike()
                    with self._changed:
                        self._changed.wait_for(lambda: self._fault.kind != "hang")
                elif fault.kind == "delay" and answers:
                    self._strike()
                    time.sleep(fault.amount)
                elif fault.kind == "slow":
                    self._strike()
                    time.sleep(self._on_the_way(len(block), fault) + (fault.amount if begins else 0.0))
                elif fault.kind == "drop" and passed + len(block) > fault.amount and self._strike():
                    target.sendall(block[: max(0, int(fault.amount) - passed)])
                    raise ConnectionResetError
                target.sendall(block)
                passed += len(block)
        except OSError:
            for end in (source, target):
                self._close(end, reset=True)
        else:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)
            if answers:
                self._close(source)
                self._close(target)

    def _on_the_way(self, length: int, fault: Fault) -> float:
        """Seconds until a slow link has passed so many bytes, behind those that it has yet to pass."""
        with self._changed:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + length / fault.rate
            return self._free_at - now

    def _reset_all(self) -> None:
        for end in list(self._open):
            self._close(end, reset=True)

    def _close(self, end: socket.socket, *, reset: bool = False) -> None:
        self._open.discard(end)
        self._asked.discard(end)
        with contextlib.suppress(OSError):
            if reset:  # without lingering, a close sends RST
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RD)  # wakes a thread that waits in recv
            end.close()


def _answer_503(client: socket.socket) -> None:
    """Reads one HTTP request to its end and turns it down."""
    client.settimeout(10)
    request = b""
    while b"\r\n\r\n" not in request:
        if not (block := client.recv(CHUNK)):
            return
        request += block
    head, _, body = request.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
    if b"expect" not in fields:
        left = int(fields.get(b"content-length", b"0")) - len(body)
        while left > 0 and (block := client.recv(CHUNK)):
            left -= len(block)
    kind = b"Content-Type: application/xml\r\nConnection: close\r\n"
    length = b"Content-Length: %d\r\n" % (0 if head.startswith(b"HEAD") else len(SLOW_DOWN))
    body = b"" if head.startswith(b"HEAD") else SLOW_DOWN
    client.sendall(b"HTTP/1.1 503 Slow Down\r\n" + kind + length + b"\r\n" + body)
