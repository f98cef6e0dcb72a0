"""Random state goes out and comes back, for every generator that a model or a loader may use."""

from __future__ import annotations

import random

import numpy as np
import torch

from longstride.workers.random_state import random_state, seed_everything, set_random_state


def draw() -> list[float]:
    gauss = random.gauss(0, 1)  # keeps half of a pair for the next call
    return [random.random(), gauss, float(np.random.rand()), float(np.random.randn()), float(torch.randn(()))]


def test_generators_go_on_where_they_were() -> None:
    seed_everything(3, 1)
    draw()
    saved = random_state()
    expected = [draw(), draw()]
    seed_everything(4, 1)
    set_random_state(saved)
    assert [draw(), draw()] == expected


def test_seeds_differ_by_process_and_step() -> None:
    draws = []
    for place in [(0, 0), (0, 1), (1, 0), (0, 0, 5)]:
        seed_everything(*place)
        draws.append(tuple(draw()))
    assert len(set(draws)) == 4
    seed_everything(0, 1)
    assert tuple(draw()) == draws[1]
