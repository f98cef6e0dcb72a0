"""A memory S of values by keys that every token multiplies by a matrix of its own, over a sequence that is split.

    S_t = S_{t-1} (diag(w_t) + a_t b_t') + v_t k_t'          y_t = S_t r_t

The equations are `kernels.wkv7`'s. A shard's tokens act on the memory that enters as the product of their matrices: two
matrices N x N a head cross a boundary, whatever the length. They leave before r is known, and are awaited after the
outputs have been computed as if the shard began from nothing; in the backward pass gradients travel at the same place.
Shapes: B batch, T local tokens, H heads, N head width.
"""

from __future__ import annotations

from torch import Tensor

from ...kernels import begin_wkv7, wkv7
from ...parallel import Dense, SequenceShard, begin_prefix_state


class MatrixMemory:
    """The memory of a shard's tokens, on its way to the next shard from the moment this is made.

    It is empty where a document begins. All but `shard` and `initial_BHNN` (B, T, H, N).
    `initial_BHNN`: the memory before the sequence, where there is one, the same on every process.
    """

    def __init__(
        self,
        log_w_BTHN: Tensor,
        k_BTHN: Tensor,
        v_BTHN: Tensor,
        a_BTHN: Tensor,
        b_BTHN: Tensor,
        shard: SequenceShard,
        initial_BHNN: Tensor | None = None,
    ) -> None:
        self._stored, self._shard = (log_w_BTHN, k_BTHN, v_BTHN, a_BTHN, b_BTHN), shard
        self._initial_BHNN = initial_BHNN
        self._starts_BT = shard.start_mask(k_BTHN.device)
        if shard.size > 1:
            self._stages = begin_wkv7(*self._stored, document_starts=self._starts_BT)
            # memories are values by keys and transitions act on keys: the prefix is over transposed memories. The
            # transition of a shard in which a document begins is zero, so that nothing else must say so
            self._transition = Dense(self._stages.transition.mT.contiguous())
            self._own_BHNN = self._stages.leaving.mT.contiguous()
            initial_BHNN = None if initial_BHNN is None else initial_BHNN.mT
            self._entering = begin_prefix_state(self._transition, self._own_BHNN, shard, initial=initial_BHNN)

    def recall(self, r_BTHN: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, T, H, N) at this shard's tokens, and the memory after the last. To be called once."""
        if self._shard.size == 1:
            return wkv7(r_BTHN, *self._stored, initial_state=self._initial_BHNN, document_starts=self._starts_BT)
        self._stages.compute_local(r_BTHN)
        entering_BHNN = self._entering.wait()
        after_BHNN = self._transition.after(entering_BHNN, self._own_BHNN, self._shard.local_length)
        return self._stages.finish(entering_BHNN.mT), after_BHNN.mT
