"""How the summaries travel: interchangeable ways to form the exclusive prefix of affine maps over processes.

A strategy takes this process's segment and returns a function that waits for, and returns, the state composed from all
earlier processes (all later ones when `reverse`). The first message leaves before the strategy returns.

With S the bytes of a state and P processes, a process sends
    all_gather     (P - 1) S in one collective,
    logarithmic    at most ceil(log2 P) S in as many rounds,
    pipelined      S, in slices that follow each other along the chain (LASP, arXiv 2404.02882; ZeCO, 2507.01004),
    hierarchical   about 2 S inside its node and S / G x (nodes - 1) between nodes of G processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import ceil, log2

import torch
from torch import Tensor

from .collectives import exchange, gather, receive_from, send_to, verify_chain
from .segment import Segment, as_real, combine
from .shard import SequenceShard

PIPELINE_SLICES = 4
"""Of a pipelined state: with more of them processes wait less for the first, and send more messages."""

Landing = Callable[[], Tensor]
"""Waits for the state, and returns it."""
Strategy = Callable[[Segment, SequenceShard, bool, str], Landing]
"""(this process's segment, its shard, reverse, the motion's name in the ledger) -> landing."""


def all_gather(segment: Segment, shard: SequenceShard, reverse: bool, motion: str) -> Landing:
    """One collective: everyone receives all summaries and folds those before it."""
    pending = gather(segment.packed(), shard, motion)

    def finish() -> Tensor:
        flats = pending.wait()
        state = segment.transition.empty(segment.state)
        for rank in range(shard.size - 1, shard.rank, -1) if reverse else range(shard.rank):
            state = segment.unpacked(flats[rank], shard.length_of(rank)).after(state, transposed=reverse)
        return state

    return finish


def logarithmic(segment: Segment, shard: SequenceShard, reverse: bool, motion: str) -> Landing:
    """Hillis-Steele scan: rounds in which the reach of each process's composed map doubles."""
    place = shard.size - 1 - shard.rank if reverse else shard.rank

    def process_at(position: int) -> int:
        return shard.size - 1 - position if reverse else position

    def send(inclusive: Segment, reach: int) -> Callable[[], Segment | None]:
        flat = inclusive.packed()
        parts, shapes = [flat.new_empty(0)] * shard.size, [(0,)] * shard.size
        if place + reach < shard.size:
            parts[process_at(place + reach)] = flat
        if place >= reach:
            shapes[process_at(place - reach)] = (flat.numel(),)
        pending = exchange(parts, shapes, shard, motion)

        def receive() -> Segment | None:
            arrived = pending.wait()
            if place < reach:
                return None
            # the sender's stretch: itself and the up to reach - 1 processes before it
            places = range(max(0, place - 2 * reach + 1), place - reach + 1)
            tokens = sum(shard.length_of(process_at(position)) for position in places)
            return segment.unpacked(arrived[process_at(place - reach)], tokens)

        return receive

    first = send(segment, 1)

    def finish() -> Tensor:
        inclusive, exclusive = segment, None
        reach, receive = 1, first
        while True:
            arrived = receive()
            if arrived is not None:
                exclusive = arrived if exclusive is None else combine(arrived, exclusive, reverse=reverse)
                inclusive = combine(arrived, inclusive, reverse=reverse)
            reach *= 2
            if reach >= shard.size:
                return segment.transition.empty(segment.state) if exclusive is None else exclusive.state
            receive = send(inclusive, reach)

    return finish


def pipelined(segment: Segment, shard: SequenceShard, reverse: bool, motion: str) -> Landing:
    """Along the chain, slice by slice: each process adds its own map and passes the state on. Only states travel."""
    before, behind = (shard.rank + 1, shard.rank - 1) if reverse else (shard.rank - 1, shard.rank + 1)
    verify_chain(segment.state, shard, motion, reverse=reverse)
    slices = segment.slices(PIPELINE_SLICES)
    is_first, is_last = not 0 <= before < shard.size, not 0 <= behind < shard.size
    incoming = [] if is_first else [receive_from(before, part.state, shard, motion) for part in slices]
    sent = [send_to(behind, part.state, shard, motion) for part in slices] if is_first and not is_last else []

    def finish() -> Tensor:
        if is_first:
            for message in sent:
                message.wait()
            return segment.transition.empty(segment.state)
        entering, leaving = [], []
        for part, message in zip(slices, incoming, strict=True):
            entering.append(message.wait())
            if not is_last:
                leaving.append(send_to(behind, part.after(entering[-1], transposed=reverse), shard, motion))
        for message in leaving:
            message.wait()
        return torch.cat(entering, dim=1)

    return finish


def hierarchical(segment: Segment, shard: SequenceShard, reverse: bool, motion: str) -> Landing:
    """Two levels: inside a node each process takes a slice of the state of all its neighbours; only slices of whole
    nodes' maps travel between nodes; the prefixes go home inside the node.

    Raises:
        ValueError: the group is not made of whole nodes.
    """
    per_node = shard.node_size or shard.size
    if shard.size % per_node:
        raise ValueError(f"{shard.size} processes are not whole nodes of {per_node}: choose another prefix strategy")
    node, place = divmod(shard.rank, per_node)
    neighbours = range(node * per_node, (node + 1) * per_node)
    slices = segment.slices(per_node)
    none = segment.state.new_empty(0, dtype=segment.packed().dtype)
    mine = slices[place] if place < len(slices) else None
    width = mine.numel() if mine is not None else 0

    def route(parts: dict[int, Tensor], sizes: dict[int, int]) -> Callable[[], list[Tensor]]:
        outgoing = [parts.get(rank, none) for rank in range(shard.size)]
        return exchange(outgoing, [(sizes.get(rank, 0),) for rank in range(shard.size)], shard, motion).wait

    gathered = route({neighbours[i]: part.packed() for i, part in enumerate(slices)}, dict.fromkeys(neighbours, width))

    def visit(items: Sequence[int]) -> list[int]:
        return list(reversed(items)) if reverse else list(items)

    def finish() -> Tensor:
        arrived = gathered()
        maps: dict[int, Segment] = {}
        if mine is not None:
            maps = {rank: mine.unpacked(arrived[rank], shard.length_of(rank)) for rank in neighbours}
        prefixes = _across_nodes(maps, mine, visit, route, shard, reverse, per_node)
        sizes = {neighbours[i]: as_real(part.state).numel() for i, part in enumerate(slices)}
        home = route({rank: as_real(state).reshape(-1) for rank, state in prefixes.items()}, sizes)()
        pieces = [home[neighbours[i]].view(as_real(part.state).shape) for i, part in enumerate(slices)]
        states = [torch.view_as_complex(p.clone()) if segment.state.is_complex() else p for p in pieces]
        return torch.cat(states, dim=1).to(segment.state.dtype)

    return finish


def _across_nodes(
    maps: dict[int, Segment],
    mine: Segment | None,
    visit: Callable[[Sequence[int]], list[int]],
    route: Callable[[dict[int, Tensor], dict[int, int]], Callable[[], list[Tensor]]],
    shard: SequenceShard,
    reverse: bool,
    per_node: int,
) -> dict[int, Tensor]:
    """The state entering every process of this node, for this process's slice of the channels."""
    node, place = divmod(shard.rank, per_node)
    nodes = visit(range(shard.size // per_node))
    peers = {other: other * per_node + place for other in nodes if other != node}
    if mine is None:
        route({}, {})()
        return {}
    whole = reduce(lambda a, b: combine(a, b, reverse=reverse), [maps[rank] for rank in visit(sorted(maps))])
    after = nodes[nodes.index(node) + 1 :]
    before = nodes[: nodes.index(node)]
    packed = whole.packed()
    arrived = route({peers[n]: packed for n in after}, {peers[n]: packed.numel() for n in before})()
    state = mine.transition.empty(mine.state)
    for other in before:
        ranks = range(other * per_node, (other + 1) * per_node)
        tokens = sum(shard.length_of(rank) for rank in ranks)
        state = mine.unpacked(arrived[peers[other]], tokens).after(state, transposed=reverse)
    prefixes = {}
    for rank in visit(sorted(maps)):
        prefixes[rank] = state
        state = maps[rank].after(state, transposed=reverse)
    return prefixes


STRATEGIES: dict[str, Strategy] = {
    "all_gather": all_gather,
    "logarithmic": logarithmic,
    "pipelined": pipelined,
    "hierarchical": hierarchical,
}


def choose_strategy(wanted: str, segment: Segment, shard: SequenceShard) -> str:
    """The cost model: seconds of each strategy from the link's latency and bandwidth; the cheapest unless `wanted`."""
    if wanted != "auto":
        return wanted
    seconds = predicted_seconds(segment.numel() * as_real(segment.state).element_size(), shard)
    return min(seconds, key=lambda name: seconds[name])


def predicted_seconds(state_bytes: int, shard: SequenceShard) -> dict[str, float]:
    """What each strategy would take for a state of `state_bytes` over the links that the shard describes."""
    P, link = shard.size, shard.link
    per_node = shard.node_size or P
    transfer = state_bytes / link.bytes_per_second
    seconds = {
        "all_gather": link.latency + (P - 1) * transfer,
        "logarithmic": ceil(log2(P)) * (link.latency + transfer),
        "pipelined": (P + PIPELINE_SLICES - 2) * (link.latency + transfer / PIPELINE_SLICES),
    }
    if per_node < P and P % per_node == 0:
        inside = state_bytes / link.bytes_per_second_in_node
        between = (P // per_node - 1) * transfer / per_node
        seconds["hierarchical"] = 3 * link.latency + 2 * inside + between
    return seconds
