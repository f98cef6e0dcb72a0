"""Long convolution of an input that is sharded along its length, in whatever form suits the filter.

Shapes: B batch, T tokens here, L all tokens, D channels, K taps. Hyena (arXiv 2302.10866), StripedHyena 2
(2503.01868).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.long_convolution import long_convolution
from ..kernels.modal_convolution import begin_modal_convolution, modal_convolution
from .fourier import Window, convolve_window
from .halo import halo
from .prefix import begin_prefix_state
from .reshard import begin_reshard, reshard
from .shard import SequenceShard, even_bounds
from .transitions import Constant

FORMS = ("channels", "length", "halo", "state")

FLOPS_PER_NUMBER = 200
"""Operations that take as long as sending a number: some dozens over gloo, some hundreds between GPUs of a node."""


class Filter(Protocol):
    """A filter that any process can evaluate at any lags, for any slice of its channels."""

    def __call__(self, lags_K: Tensor, channels: slice) -> Tensor:
        """Values (channels, K) at global lags (int64), differentiable in the filter's parameters."""
        ...


@dataclass(frozen=True)
class FiniteFilter:
    """A filter of K taps, `taps_DK[:, k]` at lag k, zero beyond."""

    taps_DK: Tensor

    def __call__(self, lags_K: Tensor, channels: slice) -> Tensor:
        taps_DK = self.taps_DK[channels]
        inside = lags_K < taps_DK.shape[1]
        return torch.where(inside, taps_DK[:, lags_K.clamp(max=taps_DK.shape[1] - 1)], 0.0)


@dataclass(frozen=True)
class ModalFilter:
    """A sum of exponentials: Re sum_n residues_n e^(k log_poles_n) at lag k (S4D, H3, modal Hyena).

    `log_poles_DN`, `residues_DN`: both real or both complex, float32 or wider.
    """

    log_poles_DN: Tensor
    residues_DN: Tensor

    def __call__(self, lags_K: Tensor, channels: slice) -> Tensor:
        wide = torch.complex128 if self.log_poles_DN.is_complex() else torch.float64
        powers = torch.exp(self.log_poles_DN[channels].to(wide).unsqueeze(-1) * lags_K)
        taps_DK = (self.residues_DN[channels].to(wide).unsqueeze(-1) * powers).sum(1)
        return (taps_DK.real if taps_DK.is_complex() else taps_DK).to(self.residues_DN.real.dtype)


@dataclass(frozen=True)
class SharedFilter:
    """A filter that takes `shared_flops` operations a lag before its channels part (a network of the position)."""

    evaluate: Filter
    shared_flops: float

    def __call__(self, lags_K: Tensor, channels: slice) -> Tensor:
        return self.evaluate(lags_K, channels)


def convolve(
    u_BTD: Tensor,
    filter: Filter,
    shard: SequenceShard,
    *,
    skip: Tensor | None = None,
    input_gate: Tensor | None = None,
    form: str | None = None,
) -> Tensor:
    """y_t = sum over s <= t of filter(t - s) v_s + skip v_t with v = input_gate u, within each document: (B, T, D).

    Args:
        u_BTD: this shard's input.
        skip: (D,) the direct term.
        input_gate: (B, T, D), ones by default. Multiplied here, so that one tensor travels in and one out; for a whole
            sequence and a filter without end, inside the convolution, a block of channels at a time.
        form: how it travels; by default what the shard asks for, "auto" choosing the fewest bytes (modal filters and
            short finite ones have one form of their own and keep it, whatever the shard asks for).
            "channels": to a split along channels (all-to-all, while the filter is evaluated), by FFT at full length
                there, and back;
                2 T D (P - 1) / P numbers per process and direction. Each evaluates its channels of the filter, or,
                where that repeats much work on every process, its lags, for T D (P - 1) / P numbers more.
            "length": each process transforms its tokens, frequencies travel, and back; 4 T D (P - 1) / P numbers and,
                for the filter, half of it divided by B, but no process ever holds a full-length row. For few channels
                per process and very long rows.
            "halo": finite filters only; the K - 1 tokens before this shard.
            "state": modal filters only; a prefix pass over the modes' states, D N numbers whatever the length.

    Raises:
        ValueError: an unknown form, or one that needs another kind of filter.
    """
    if shard.size == 1 and form in (None, "auto") and not isinstance(filter, FiniteFilter | ModalFilter):
        return _whole(u_BTD, filter, shard, skip, input_gate)
    v_BTD = u_BTD if input_gate is None else input_gate * u_BTD
    return begin_convolve(v_BTD, filter, shard, skip=skip, form=form)()


def begin_convolve(
    u_BTD: Tensor, filter: Filter, shard: SequenceShard, *, skip: Tensor | None = None, form: str | None = None
) -> Callable[[], Tensor]:
    """`convolve` in two halves: calling the result gives y.

    In the "state" form the message travels in between, and while most of the convolution is computed at the begin of
    the second half.
    """
    if form is not None and form != "auto" and form not in FORMS:
        raise ValueError(f"unknown convolution form {form!r}: choose auto, {', '.join(FORMS)}")
    chosen = _choose(filter, u_BTD.shape[-1], shard) if form in (None, "auto") else form
    if chosen == "state":
        return _begin_by_state(u_BTD, filter, shard, skip)
    if chosen == "halo":
        y_BTD = _by_halo(u_BTD, filter, shard, skip)
    elif chosen == "length" and shard.size > 1:
        y_BTD = _by_length(u_BTD, filter, shard, skip)
    else:
        y_BTD = _by_channels(u_BTD, filter, shard, skip)
    return lambda: y_BTD


def _choose(filter: Filter, num_channels: int, shard: SequenceShard) -> str:
    """Fewest bytes: a modal filter's state, a finite filter's halo if narrower than what an all-to-all would move; for
    filters without end what the shard asks for, the all-to-all by default."""
    if isinstance(filter, ModalFilter):
        return "state"
    if isinstance(filter, FiniteFilter) and filter.taps_DK.shape[1] - 1 <= 2 * shard.length / shard.size:
        return "halo"
    if shard.strategies.convolution != "auto":
        return shard.strategies.convolution
    return "channels" if num_channels >= shard.size else "length"


def _begin_by_state(u_BTD: Tensor, filter: Filter, shard: SequenceShard, skip: Tensor | None) -> Callable[[], Tensor]:
    if not isinstance(filter, ModalFilter):
        raise ValueError("convolution form 'state' needs a modal filter: use 'channels' or 'length'")
    poles_DN, residues_DN = filter.log_poles_DN, filter.residues_DN
    starts_BT = shard.start_mask(u_BTD.device)
    if shard.size == 1:
        y_BTD, _ = modal_convolution(u_BTD, poles_DN, residues_DN, skip=skip, document_starts=starts_BT)
        return lambda: y_BTD
    stages = begin_modal_convolution(u_BTD, poles_DN, residues_DN, skip=skip, document_starts=starts_BT)
    pending = begin_prefix_state(Constant(poles_DN, shard.reset_mask(u_BTD.device)), stages.leaving, shard)

    def finish() -> Tensor:
        stages.compute_local()
        return stages.finish(pending.wait())

    return finish


def _whole(
    u_BTD: Tensor, filter: Filter, shard: SequenceShard, skip: Tensor | None, input_gate: Tensor | None
) -> Tensor:
    """Nothing travels: one process has the sequence."""
    taps_DL = filter(torch.arange(shard.length, device=u_BTD.device), slice(0, u_BTD.shape[-1]))
    starts_BT = shard.start_mask(u_BTD.device)
    return long_convolution(u_BTD, taps_DL, skip=skip, input_gate=input_gate, document_starts=starts_BT)


def _by_channels(u_BTD: Tensor, filter: Filter, shard: SequenceShard, skip: Tensor | None) -> Tensor:
    num_channels = u_BTD.shape[-1]
    bounds = even_bounds(num_channels, shard.size)
    mine = slice(bounds[shard.rank], bounds[shard.rank + 1])
    arrive = begin_reshard(u_BTD, shard, to="channels")
    filter_DL = _filter_of_channels(filter, mine, num_channels, shard, u_BTD.device)
    starts = shard.whole_start_mask(u_BTD.device)
    y_BLD = long_convolution(arrive(), filter_DL, skip=None if skip is None else skip[mine], document_starts=starts)
    return reshard(y_BLD, shard, to="length", channels=num_channels)


def _filter_of_channels(
    filter: Filter, mine: slice, num_channels: int, shard: SequenceShard, device: torch.device
) -> Tensor:
    """(D of `mine`, L)."""
    # forward, recomputed and backward, what the others compute as well, over the numbers sent in both directions
    shared_flops = 2 * filter.shared_flops * shard.size if isinstance(filter, SharedFilter) else 0
    if shard.size > 1 and shared_flops >= FLOPS_PER_NUMBER * num_channels:
        taps_DT = filter(torch.arange(shard.start, shard.stop, device=device), slice(0, num_channels))
        return reshard(taps_DT.t().unsqueeze(0), shard, to="channels").squeeze(0).t()
    return filter(torch.arange(shard.length, device=device), mine)


def _by_halo(u_BTD: Tensor, filter: Filter, shard: SequenceShard, skip: Tensor | None) -> Tensor:
    if not isinstance(filter, FiniteFilter):
        raise ValueError("convolution form 'halo' needs a finite filter: use 'channels' or 'length'")
    width = filter.taps_DK.shape[1] - 1
    if shard.size == 1:
        return long_convolution(u_BTD, filter.taps_DK, skip=skip, document_starts=shard.start_mask(u_BTD.device))
    before_BWD = halo(u_BTD, width, shard)
    starts = shard.start_mask(u_BTD.device)
    if starts is not None:
        starts = torch.cat([starts.new_zeros(starts.shape[0], width), starts], dim=1)
    joined = torch.cat([before_BWD, u_BTD], dim=1)
    return long_convolution(joined, filter.taps_DK, skip=skip, document_starts=starts)[:, width:]


def _by_length(u_BTD: Tensor, filter: Filter, shard: SequenceShard, skip: Tensor | None) -> Tensor:
    """Documents that cross a boundary between processes one distributed transform each, the others where they are."""
    dtype = torch.promote_types(u_BTD.dtype, torch.float32)
    u_BTD_wide = u_BTD.to(dtype)
    rows = shard.document_starts
    if rows is None or not len(u_BTD):
        y_BTD = _window(u_BTD_wide, filter, Window(shard, 0, shard.length))
    else:
        y_BTD = torch.cat(
            [
                _one_row(u_BTD_wide[row : row + 1], filter, shard, rows[row if len(rows) > 1 else 0])
                for row in range(u_BTD.shape[0])
            ]
        )
    if skip is not None:
        y_BTD = y_BTD + u_BTD_wide * skip
    return y_BTD.to(u_BTD.dtype)


def _window(u_BTD: Tensor, filter: Filter, window: Window) -> Tensor:
    """One document of a row of the batch, or of all rows: this shard's tokens of it."""
    own, length = window.lags(), window.end - window.begin
    lags_T = torch.arange(own.start, own.stop, device=u_BTD.device)
    taps_DT = filter(lags_T.clamp(max=length - 1), slice(0, u_BTD.shape[-1]))
    return convolve_window(u_BTD, torch.where(lags_T < length, taps_DT, 0.0).to(u_BTD.dtype), window)


def _one_row(u_1TD: Tensor, filter: Filter, shard: SequenceShard, starts: tuple[int, ...]) -> Tensor:
    """A row of the batch with several documents. Every process visits the crossing ones in the same order."""
    pieces: list[Tensor] = []
    for begin, end in pairwise((0, *starts, shard.length)):
        first, last = max(begin, shard.start), min(end, shard.stop)
        here = u_1TD[:, max(first, shard.start) - shard.start : max(first, last) - shard.start]
        if any(begin < bound < end for bound in shard.bounds[1:-1]):
            pieces.append(_window(here, filter, Window(shard, begin, end)))
        elif first < last:
            lags = torch.arange(last - first, device=u_1TD.device)
            pieces.append(long_convolution(here, filter(lags, slice(0, u_1TD.shape[-1]))))
    return torch.cat(pieces, dim=1)
