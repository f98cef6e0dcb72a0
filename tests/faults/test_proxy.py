"""The proxy itself: without a fault every byte passes, and each fault is what it says."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ..timing import in_time
from .proxy import FaultProxy

BODY = bytes(range(256)) * 4000


class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, format: str, *args: object) -> None: ...


class Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def upstream() -> Iterator[tuple[str, int]]:
    server = Quiet(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield "127.0.0.1", server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxy(upstream: tuple[str, int]) -> Iterator[FaultProxy]:
    with FaultProxy(upstream) as started:
        yield started


def get(proxy: FaultProxy, timeout: float = 10) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(proxy.host, proxy.port, timeout=timeout)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_every_byte_passes(proxy: FaultProxy) -> None:
    assert get(proxy) == (200, BODY)
    assert proxy.faults == 0


def test_refused_until_healed(proxy: FaultProxy) -> None:
    proxy.refuse()
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            get(proxy)
    proxy.heal()
    assert get(proxy) == (200, BODY)


def test_throttled_so_many_times(proxy: FaultProxy) -> None:
    proxy.throttle(times=2)
    assert [get(proxy)[0] for _ in range(4)] == [503, 503, 200, 200]
    assert proxy.faults == 2


def test_dropped_in_the_middle_of_an_answer(proxy: FaultProxy) -> None:
    proxy.drop(after=100_000, times=1)
    with pytest.raises((ConnectionError, http.client.IncompleteRead)):
        get(proxy)
    assert get(proxy) == (200, BODY)


def test_delayed(proxy: FaultProxy) -> None:
    proxy.delay(0.1)
    began = time.monotonic()
    assert get(proxy) == (200, BODY)
    assert time.monotonic() - began > 0.1


@pytest.mark.timing
def test_a_slow_link_passes_so_many_bytes_a_second(proxy: FaultProxy) -> None:
    proxy.slow(rate=len(BODY) / 0.5, latency=0.2)
    began = time.monotonic()
    threads = [threading.Thread(target=get, args=(proxy,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    assert seconds > 1.0, "both share it"
    in_time(seconds < 5, seconds)


def test_what_hangs_arrives_once_healed(proxy: FaultProxy) -> None:
    proxy.hang()
    with pytest.raises(TimeoutError):
        get(proxy, timeout=0.2)
    proxy.hang(lasts=0.3)
    began = time.monotonic()
    assert get(proxy) == (200, BODY)
    assert time.monotonic() - began > 0.3


def test_healing_later_is_for_the_fault_of_now_alone(proxy: FaultProxy) -> None:
    proxy.hang()
    proxy.heal_after(0.1)
    proxy.refuse()
    time.sleep(0.3)
    with pytest.raises(ConnectionRefusedError):
        get(proxy)
