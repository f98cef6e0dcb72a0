"""A motion in two halves, between which something else is computed: `depart` sends, `arrive` awaits.

In the backward pass the halves swap: the gradients of what arrived are sent where `arrive` stood and awaited where
`depart` did, and travel while those of what was computed in between are computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..kernels.autograd import first_order, own_precision


class Flight(ABC):
    """What both halves know: the message under way, and what its way back needs."""

    @abstractmethod
    def send(self, *tensors: Tensor) -> None:
        """Forward, first half."""

    @abstractmethod
    def land(self) -> tuple[Tensor, ...]:
        """Forward, second half: what has arrived."""

    @abstractmethod
    def send_back(self, *gradients: Tensor) -> None:
        """Backward, first half: the gradients of what `land` returned."""

    @abstractmethod
    def land_back(self) -> tuple[Tensor, ...]:
        """Backward, second half: the gradients of what `send` was given."""


def depart(flight: Flight, *tensors: Tensor) -> Tensor:
    """The first half. The result is a number that stands for the message in autograd's graph: hand it to `arrive`."""
    anchor = _Depart.apply(flight, *tensors)
    assert isinstance(anchor, Tensor)
    return anchor


def arrive(flight: Flight, anchor: Tensor) -> tuple[Tensor, ...]:
    """The second half, once on every process that departed: what `land` returns, differentiably."""
    arrived = _Arrive.apply(flight, anchor)
    assert isinstance(arrived, tuple)
    return arrived


class _Depart(torch.autograd.Function):
    @staticmethod
    @own_precision
    def forward(ctx: Any, flight: Flight, *tensors: Tensor) -> Tensor:
        ctx.flight = flight
        flight.send(*(tensor.detach() for tensor in tensors))
        return tensors[0].new_zeros(())

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.flight.land_back()


class _Arrive(torch.autograd.Function):
    @staticmethod
    @own_precision
    def forward(ctx: Any, flight: Flight, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        return flight.land()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.flight.send_back(*grads)
        return None, grads[0].new_zeros(())
