"""Random state of a process as one tensor of bytes, and back. JSON inside, so that reading it runs no code."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int, rank: int, step: int = 0) -> None:
    """Seeds Python's, NumPy's and torch's generators; differently on every process and from every step on."""
    mixed = np.random.SeedSequence([seed, rank, step]).generate_state(2, dtype=np.uint32)
    random.seed(int(mixed[0]))
    np.random.seed(int(mixed[1]))
    torch.manual_seed(int(mixed[0]) << 16 ^ int(mixed[1]))


def random_state() -> Tensor:
    """(N,) uint8: the state of Python's, NumPy's and torch's generators, the device's included."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [str(kind), np.asarray(keys).tolist(), *rest],
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def set_random_state(encoded: Tensor) -> None:
    """Puts back what `random_state` returned; device states only where the number of devices is the same."""
    state: dict[str, Any] = json.loads(encoded.numpy().tobytes())
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numbers, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(numbers, dtype=np.uint32), *rest))
    torch.set_rng_state(_decode(state["torch"]))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decode(device) for device in state["cuda"]])


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
