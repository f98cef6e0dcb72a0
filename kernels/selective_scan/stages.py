"""The selective scan in two stages, so that a split sequence's state travels while other work is done.

First the scan from zero: outputs, the state that leaves and the summed step sizes, which say what becomes of a state
that enters. Last what the state that enters adds to the outputs, in place and only for as long as it is alive: a small
part of the scan's work. In the backward pass the last stage gives the gradient of that state, and nothing else: the
first one's backward, which by then knows the state, adds what is left of it to the states it has kept, and so computes
all other gradients from the true states at once, as one process would.

Legend: B batch, T tokens, D channels, N states per channel, K kept states of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Entering:
    """What the stages of one scan share: the state that enters it, as soon as it is known, and the summed steps.

    The first stage's backward holds it, so nothing big may stay in it where activations are computed again.
    """

    state_BDN: Tensor | None = None
    sums: tuple[Tensor, Tensor] | None = None

    def note(self, sums_BKD: Tensor) -> Tensor:
        """Step sizes summed up to each kept state, (B, K, D), from those summed between one and the next."""
        upto_BKD = sums_BKD.cumsum(1)
        before_BKD = F.pad(upto_BKD[:, :-1], (0, 0, 1, 0))[:, : upto_BKD.shape[1]]
        self.sums = before_BKD, upto_BKD[:, -1].clone() if upto_BKD.shape[1] else upto_BKD.sum(1)
        return before_BKD

    def take_sums(self) -> tuple[Tensor, Tensor]:
        """What `note` returned, and the sums over all tokens (B, D); once."""
        assert self.sums is not None
        sums, self.sums = self.sums, None
        return sums


class ScanStages:
    """A scan whose entering state may still be under way; see `begin_selective_scan`.

    Attributes:
        leaving: (B, D, N), the state after the last token had no state entered. The gradient that it is given counts as
            that of the state which truly leaves, exp(A steps) entering + leaving: what it says of A and of the step
            sizes is in their gradients already.
        steps: (B, D), the sums of the step sizes; without a gradient, for the same reason.
    """

    def __init__(
        self, enter: type[torch.autograd.Function], entering: Entering, y_BTD: Tensor, leaving_BDN: Tensor,
        delta_BTD: Tensor, A_DN: Tensor, C_BTN: Tensor, delta_bias: Tensor | None, starts_BT: Tensor | None,
        softplus: bool,
    ) -> None:  # fmt: skip
        self._enter, self._entering, self._y = enter, entering, y_BTD
        read = delta_BTD, A_DN, C_BTN, delta_bias
        before_BKD, self.steps = entering.take_sums()
        self._read = *(None if x is None else x.detach() for x in read), starts_BT, before_BKD, softplus
        self.leaving = leaving_BDN

    def finish(self, entering_BDN: Tensor) -> Tensor:
        """y_BTD in the dtype of u, given the state before the first token; to be called once.

        Raises:
            ValueError: unless the state has the shape of `leaving`.
        """
        if entering_BDN.shape != self.leaving.shape:
            raise ValueError(
                f"selective scan: entering_BDN has shape {tuple(entering_BDN.shape)}, "
                f"expected {tuple(self.leaving.shape)}"
            )
        entering_BDN = entering_BDN.to(self.leaving.dtype)
        self._entering.state_BDN = entering_BDN.detach()
        return self._enter.apply(self._y, entering_BDN, *self._read)
