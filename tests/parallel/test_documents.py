"""Where documents begin, as every layer asks its shard."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longstride.parallel import SequenceShard

LENGTH = 29
ROWS = [[[3, 11, 12, 28], [], [7]], [[14]], [[10, 20]]]


def begin_of(position: int, starts: list[int]) -> int:
    return max(start for start in (0, *starts) if start <= position)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bounds", [(0, 29), (0, 10, 20, 29), (0, 12, 13, 14, 29)])
def test_each_token_knows_its_document(rows: list[list[int]], bounds: tuple[int, ...]) -> None:
    whole = SequenceShard.whole(LENGTH, rows)
    expected = torch.tensor([[begin_of(position, starts) for position in range(LENGTH)] for starts in rows])
    begins = torch.tensor([[position in starts for position in range(LENGTH)] for starts in rows])
    assert torch.equal(whole.whole_document_begin(), expected)
    for rank in range(len(bounds) - 1):
        shard = replace(whole, bounds=bounds, rank=rank)
        here = slice(shard.start, shard.stop)
        mask = shard.start_mask()
        assert mask is not None and torch.equal(mask, begins[:, here])
        assert torch.equal(shard.document_begin(), expected[:, here])
        assert (whole_mask := shard.whole_start_mask()) is not None and torch.equal(whole_mask, begins)


def test_copies_of_a_shard_share_what_they_know() -> None:
    """FSDP in mixed precision hands each layer a copy; a GPU would be sent the same masks by every layer."""
    shard = SequenceShard.whole(LENGTH, ROWS[0])
    assert replace(shard).labelled("5.mamba").start_mask() is shard.start_mask()
    assert SequenceShard.whole(LENGTH, ROWS[1]).start_mask() is not shard.start_mask()


def test_what_a_decoder_asked_for_may_be_trained_with() -> None:
    shard = SequenceShard.whole(LENGTH + 1, ROWS[0])
    with torch.inference_mode():
        begin = shard.document_begin()
    assert not begin.is_inference()
    assert torch.ones(LENGTH + 1, requires_grad=True)[begin].sum().requires_grad
