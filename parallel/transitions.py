"""Transitions: how the state entering a stretch of tokens acts on the state leaving it, state_out = M state_in + c.

A transition says what of M must travel beside the state (never more than needed: Mamba-1 sends D summed step sizes,
not D x N decays; a constant decay sends nothing), how M acts on a state, and how two stretches compose. Document
resets make M zero. Sources: S4 (arXiv 2111.00396), Mamba (2312.00752), Mamba-2 (2405.21060), RetNet (2307.08621),
RWKV (2305.13048).

Shapes: B batch, D channels, N state, H heads. Dimension 1 of every state is channels or heads, along which a state can
be sliced; the decay broadcasts against the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from ..kernels.wkv4 import EMPTY


@dataclass(frozen=True, eq=False)
class Transition(ABC):
    """M of one stretch of tokens; subclasses hold `reset_B` (B or 1,) bool: a document begins inside."""

    @abstractmethod
    def travelling(self) -> Tensor | None:
        """The data-dependent numbers that define M, as sent to other processes; None when there are none."""

    @abstractmethod
    def apply(self, travelling: Tensor | None, tokens: int, state: Tensor, *, transposed: bool = False) -> Tensor:
        """M state (or its adjoint, for gradients), for a stretch of `tokens` tokens with these numbers."""

    @abstractmethod
    def sliced(self, part: slice, like: Tensor) -> Self:
        """The transition of channels (or heads) `part` of a state shaped like `like`."""

    def compose(self, earlier: Tensor, later: Tensor) -> Tensor:
        """The travelling numbers of two stretches in a row; sums of logarithms unless overridden."""
        return earlier + later

    def forget(self, state: Tensor, keep: Tensor) -> Tensor:
        """`state` where keep (broadcastable) is 1, the empty state where it is 0."""
        return state * keep

    def merge(self, moved: Tensor, own: Tensor) -> Tensor:
        """M state_in + c, given both terms."""
        return moved + own

    def empty(self, like: Tensor) -> Tensor:
        """The state at the beginning of a document."""
        return torch.zeros_like(like)

    def after(self, entering: Tensor, own: Tensor, tokens: int) -> Tensor:
        """The state that leaves this stretch of `tokens` tokens, given `own`, the one that it reaches from zero."""
        moved = self.apply(self.travelling(), tokens, entering)
        if self.reset is not None:
            moved = self.forget(moved, ~self.reset.reshape(-1, *([1] * (moved.dim() - 1))))
        return self.merge(moved, own)

    # Gradients travel like states. Classes whose states are scaled representations translate here.

    def gradient_to_send(self, gradient: Tensor, entering: Tensor) -> Tensor:
        """The gradient of the entering state, as an element of the reversed prefix."""
        return gradient

    def gradient_of_own(self, arrived: Tensor, own: Tensor) -> Tensor:
        """The gradient of the state this stretch reached from zero, from what the reversed prefix brought."""
        return arrived

    def gradient_of_moved(self, arrived: Tensor, moved: Tensor) -> Tensor:
        """The gradient of `apply`'s result."""
        return arrived

    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that M is differentiable in."""
        return tuple(getattr(self, name) for name in self._input_names())

    def with_inputs(self, inputs: tuple[Tensor, ...]) -> Self:
        """The same transition over other tensors."""
        return replace(self, **dict(zip(self._input_names(), inputs, strict=True)))

    def _input_names(self) -> list[str]:
        return [f.name for f in fields(self) if f.name != "reset_B"]

    @property
    def reset(self) -> Tensor | None:
        return getattr(self, "reset_B", None)


@dataclass(frozen=True, eq=False)
class Constant(Transition):
    """The same decay at every token (S4D, H3, RetNet, modal Hyena): nothing but the state travels.

    `log_decay`: logarithm of one token's decay, real or complex, broadcastable to the state without its batch.
    The power over many tokens is taken in double precision: at a million tokens single precision loses complex
    phases (3.7e-2 relative error, measured).
    """

    log_decay: Tensor
    reset_B: Tensor | None = None

    def travelling(self) -> None:
        return None

    def apply(self, travelling: Tensor | None, tokens: int, state: Tensor, *, transposed: bool = False) -> Tensor:
        wide = torch.complex128 if self.log_decay.is_complex() else torch.float64
        decay = torch.exp(self.log_decay.to(wide) * tokens)
        # the adjoint of a multiplication by a complex number conjugates it
        return (decay.conj() if transposed else decay).to(state.dtype) * state

    def sliced(self, part: slice, like: Tensor) -> Constant:
        return replace(self, log_decay=self.log_decay.expand(like.shape[1:])[part])


@dataclass(frozen=True, eq=False)
class PerChannel(Transition):
    """Decay exp(rate * step_sum), Mamba-1's: only the D summed step sizes of a channel travel.

    `rate_DN`: the continuous-time rates A (negative), parameters that every process has; `step_sum_BD`: sum of the
    step sizes over the stretch.
    """

    rate_DN: Tensor
    step_sum_BD: Tensor
    reset_B: Tensor | None = None

    def travelling(self) -> Tensor:
        return self.step_sum_BD

    def apply(self, travelling: Tensor | None, tokens: int, state: Tensor, *, transposed: bool = False) -> Tensor:
        assert travelling is not None
        return torch.exp(self.rate_DN * travelling.unsqueeze(-1)) * state

    def sliced(self, part: slice, like: Tensor) -> PerChannel:
        return replace(self, rate_DN=self.rate_DN[part], step_sum_BD=self.step_sum_BD[:, part])


@dataclass(frozen=True, eq=False)
class PerHead(Transition):
    """Decay exp(log_decay), given summed over the stretch, Mamba-2's and gated linear attention's.

    `log_decay_BH`: real or complex; its dimensions are the leading ones of the state, one number for all the rest
    ((B, H) against (B, H, P, N); (B, H, K) for a decay per key row against (B, H, K, V)).
    """

    log_decay_BH: Tensor
    reset_B: Tensor | None = None

    def travelling(self) -> Tensor:
        return self.log_decay_BH

    def apply(self, travelling: Tensor | None, tokens: int, state: Tensor, *, transposed: bool = False) -> Tensor:
        assert travelling is not None
        decay = torch.exp(travelling.reshape(*travelling.shape, *([1] * (state.dim() - travelling.dim()))))
        return (decay.conj() if transposed else decay) * state

    def sliced(self, part: slice, like: Tensor) -> PerHead:
        return replace(self, log_decay_BH=self.log_decay_BH[:, part])


@dataclass(frozen=True, eq=False)
class Dense(Transition):
    """A full matrix, RWKV-7's and the delta rule's: state_out = matrix @ state_in.

    `matrix_BHNN`: (B, H, N, N) against states (B, H, N, M).
    """

    matrix_BHNN: Tensor
    reset_B: Tensor | None = None

    def travelling(self) -> Tensor:
        return self.matrix_BHNN

    def compose(self, earlier: Tensor, later: Tensor) -> Tensor:
        return later @ earlier

    def apply(self, travelling: Tensor | None, tokens: int, state: Tensor, *, transposed: bool = False) -> Tensor:
        assert travelling is not None
        return (travelling.mH if transposed else travelling) @ state

    def sliced(self, part: slice, like: Tensor) -> Dense:
        return replace(self, matrix_BHNN=self.matrix_BHNN[:, part])


NEVER = EMPTY[2]
"""The exponent of an empty sum."""


@dataclass(frozen=True, eq=False)
class LogSpace(Transition):
    """RWKV-4's numerator and denominator with a common exponent: state (B, D, 3) = (a, b, p), meaning a e^p, b e^p.

    `log_decay_D`: logarithm of one token's decay per channel. Sums are rescaled to the larger exponent, so that
    neither overflows. Gradients travel in the same form; the exponent is only a representation, and its own gradient
    is the one that this redundancy implies (a dL/da + b dL/db).
    """

    log_decay_D: Tensor
    reset_B: Tensor | None = None

    def travelling(self) -> None:
        return None

    def apply(self, travelling: Tensor | None, tokens: int, state: Tensor, *, transposed: bool = False) -> Tensor:
        a, b, p = state.unbind(-1)
        # an empty sum keeps its exponent
        return torch.stack([a, b, torch.where(p <= NEVER, p, p + self.log_decay_D * tokens)], dim=-1)

    def sliced(self, part: slice, like: Tensor) -> LogSpace:
        return replace(self, log_decay_D=self.log_decay_D[part])

    def forget(self, state: Tensor, keep: Tensor) -> Tensor:
        return torch.where(keep > 0, state, self.empty(state))

    def merge(self, moved: Tensor, own: Tensor) -> Tensor:
        p = torch.maximum(moved[..., 2], own[..., 2])
        left, right = torch.exp(moved[..., 2] - p)[..., None], torch.exp(own[..., 2] - p)[..., None]
        return torch.cat([moved[..., :2] * left + own[..., :2] * right, p[..., None]], dim=-1)

    def empty(self, like: Tensor) -> Tensor:
        nothing = torch.zeros_like(like)
        nothing[..., 2] = NEVER
        return nothing

    def gradient_to_send(self, gradient: Tensor, entering: Tensor) -> Tensor:
        p = entering[..., 2:]
        # dL/d(a e^p) = dL/da e^-p; an empty entering state has nobody to tell
        return torch.where(p <= NEVER, self.empty(gradient), torch.cat([gradient[..., :2], -p], dim=-1))

    def gradient_of_own(self, arrived: Tensor, own: Tensor) -> Tensor:
        ab = arrived[..., :2] * torch.exp(arrived[..., 2:] + own[..., 2:])
        ab = torch.where(arrived[..., 2:] <= NEVER, torch.zeros_like(ab), ab)
        return torch.cat([ab, (ab * own[..., :2]).sum(-1, keepdim=True)], dim=-1)

    def gradient_of_moved(self, arrived: Tensor, moved: Tensor) -> Tensor:
        return self.gradient_of_own(arrived, moved)
