"""Waiting is counted where it happens: on the processor without a GPU, on its stream with one."""

from __future__ import annotations

import time
from typing import Self

import pytest
import torch

from longstride.parallel import CommunicationLedger


class FakeEvent:
    """Stands in for CUDA's, there being no GPU in the tests: a stream whose every piece of work takes 3 ms."""

    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.reached = False
        self.milliseconds = 0.0

    def record(self) -> None:
        FakeEvent.made += 1
        self.milliseconds = 3.0 * FakeEvent.made

    def synchronize(self) -> None:
        self.reached = True

    def elapsed_time(self, later: Self) -> float:
        assert later.reached, "asked before the stream came there"
        return later.milliseconds - self.milliseconds


@pytest.mark.parametrize("on_gpu", [False, True])
def test_waiting_is_the_streams_with_a_gpu(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    if on_gpu:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    ledger = CommunicationLedger()
    for layer in ("0.mamba", "0.mamba", "1.hyena"):
        with ledger.waiting("halo", layer):
            time.sleep(0.02)
    twice, once = ledger.rows()
    if on_gpu:
        assert (twice.seconds_waited, once.seconds_waited) == pytest.approx((0.006, 0.003))
    else:
        assert twice.seconds_waited > 0.04 and 0.02 < once.seconds_waited < twice.seconds_waited
    assert ledger.seconds_waited == pytest.approx(twice.seconds_waited + once.seconds_waited), "counted once"
    with ledger.waiting("halo", "0.mamba"):
        pass
    ledger.reset()
    assert not ledger.rows() and ledger.seconds_waited == 0
