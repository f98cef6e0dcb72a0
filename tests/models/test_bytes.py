"""What a mixer that passes states sends does not grow with the length: the same bytes for twice the tokens."""

from __future__ import annotations

import torch.distributed as dist

from longstride.parallel import SequenceShard
from tests.distributed import run_ranks

from .cases import MIXER_CASES
from .test_split import Split, mixer_result

LENGTHS = (96, 192)  # shards are longer than the widest halo
FLAT = {"prefix_state", "halo", "sequential_state"}
# filters made for 64 tokens, which move activations; a solver that sends a state each time until it has converged
LEFT_OUT = {"hyena", "hyena of order 3", "conba, exact, by Newton's method"}
NAMES = [name for name in MIXER_CASES if name not in LEFT_OUT]
AT_LEAST = {
    *("mamba", "mamba2", "retnet", "linear_attention", "rwkv4", "rwkv7", "s4", "s4d", "h3", "modal_hyena"),
    *("hyena_li", "hyena_mr", "hyena_se", "lstm", "conba", "flash"),
}
Bytes = dict[str, dict[str, int]]


def sent(rank: int, world_size: int) -> list[Bytes]:
    """By length, mixer and motion."""
    found: list[Bytes] = []
    for length in LENGTHS:
        by_name: Bytes = {}
        for name in NAMES:
            split = Split((0, length // 2, length))
            shard: SequenceShard = split.shard(dist.group.WORLD)
            mixer_result(name, split, shard)
            by_name[name] = {motion: row.bytes_sent for motion, row in shard.ledger.by_motion().items()}
        found.append(by_name)
    return found


def test_states_are_as_large_at_any_length() -> None:
    for short, long in run_ranks(sent, 2):
        passing = {name for name in NAMES if {motion.split(".")[0] for motion in short[name]} <= FLAT}
        assert passing >= AT_LEAST
        assert all(sum(short[name].values()) > 0 for name in passing)
        assert {name: short[name] for name in passing} == {name: long[name] for name in passing}
        others = set(NAMES) - passing
        assert others >= {"attention", "gau"}
        assert all(sum(long[name].values()) > sum(short[name].values()) for name in others)  # the control
