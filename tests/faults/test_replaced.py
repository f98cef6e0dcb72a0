"""A file that is replaced again and again, as metrics.jsonl beside a run, is read whole at any time."""

from __future__ import annotations

import threading

from longstride.workers.storage import Storage

from .proxy import FaultProxy


def test_a_file_that_is_replaced_is_read_as_it_was(store: FaultProxy) -> None:
    storage, done = Storage("s3://bucket/run"), threading.Event()
    storage.write_text("metrics.jsonl", "")
    assert storage.read_text("metrics.jsonl") == ""

    def rewrite() -> None:
        number = 0
        while not done.is_set():
            number += 1
            storage.write_text("metrics.jsonl", f"{number}\n" * (number % 7 + 1))

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        found = [storage.read_text("metrics.jsonl").splitlines() for _ in range(150)]
    finally:
        done.set()
        writer.join()
    assert len({lines[0] for lines in found if lines}) > 5, "it was replaced meanwhile"
    assert all(not lines or (len(set(lines)) == 1 and len(lines) == int(lines[0]) % 7 + 1) for lines in found)
