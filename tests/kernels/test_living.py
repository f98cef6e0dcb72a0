"""How far an entering state is seen: heads are grouped by it, so that a read-out does little more than it must."""

import torch

from longstride.kernels.living import groups_of_heads, reach_of_heads


def test_a_small_part_of_the_work_is_left() -> None:
    """Decays of a fresh Mamba-2 layer: step sizes log-uniform in 1e-3 ... 1e-1, rates 1 ... 16."""
    length, heads = 16384, 64
    steps, rates = torch.logspace(-3, -1, heads), 1 + 15 * (torch.arange(heads) * 37 % heads) / heads
    log_decay = (-steps * rates).expand(1, length, heads)
    reach = reach_of_heads(log_decay, torch.float32, None)
    computed = sum(len(group) * tokens for group, tokens in groups_of_heads(reach))
    assert computed < 0.4 * length * heads
    assert computed >= reach.sum()
