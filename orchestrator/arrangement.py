"""Which mesh a run takes on the devices that are there, and which rank goes to which node.

Nothing here knows Ray: nodes are plain values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm

from ..parallel import Degrees
from ..workers import Experiment


@dataclass(frozen=True)
class Node:
    """A machine of the cluster.

    Attributes:
        id: Ray's name for it; address: its IP address.
        slots: workers it can take now; capacity: workers it could take if nobody else used it.
        rack: what the cluster's operator labelled it with; nodes of one rack become neighbours.
        memory: bytes of the machine that Ray gives to all work on it; 0: not known.
    """

    id: str
    address: str
    slots: int
    capacity: int
    rack: str = ""
    memory: int = 0


def fit(experiment: Experiment, devices: int) -> Experiment | None:
    """The experiment on the largest mesh that `devices` hold, never more than it asks for; None: not even one.

    The groups of processes that work on different sequences are given up first, then the sequence degree: a process
    holds no longer a part of a sequence than it must. Every degree divides what it did (context, batch, experts), so
    tokens per step and schedule stay. With `data.schedule` every stage must divide, and is planned anew.
    """
    wanted = experiment.degrees
    if wanted.workers <= devices:
        return experiment
    if devices < 1:
        return None
    if experiment.data.schedule is not None:
        return _fit_schedule(experiment, devices)
    parts = experiment.train.canonical or experiment.data.context
    sequence = _largest_divisor(parts, min(wanted.sequence, devices))
    copies = _largest_divisor(experiment.data.batch, min(wanted.replicate * wanted.data, devices // sequence))
    # Parameters stay spread over at least as many processes as they can: whole copies of them go first.
    kept = min(wanted.data, copies)
    replicate = max(r for r in range(1, wanted.replicate + 1) if copies % r == 0 and copies // r >= kept)
    data = copies // replicate
    experts = experiment.model.num_experts
    expert = max(e for e in range(1, wanted.expert + 1) if data * sequence % e == 0 and experts % e == 0)
    degrees = {"replicate": replicate, "data": data, "sequence": sequence, "expert": expert}
    parallel = experiment.parallel.model_copy(update=degrees)
    return experiment.model_copy(update={"workers": replicate * data * sequence, "parallel": parallel})


def _fit_schedule(experiment: Experiment, devices: int) -> Experiment | None:
    free = {"replicate": 1, "data": "auto", "sequence": "auto", "expert": "auto"}
    parallel = experiment.parallel.model_copy(update=free)
    for workers in range(devices, 0, -1):
        smaller = experiment.model_copy(update={"workers": workers, "parallel": parallel})
        with contextlib.suppress(ValueError):
            return Experiment.model_validate(smaller.model_dump())
    return None


def arrange(nodes: Iterable[Node], degrees: Degrees) -> list[Node]:
    """The node of every rank. ValueError: the nodes have too few slots.

    Ranks of a sequence group and of an expert group are neighbours. Whole groups are put on as few nodes as hold
    them, groups that fit on no node span as few as possible, and neighbouring ranks are on neighbouring nodes (same
    rack, then by address).
    """
    left = {node: node.slots for node in sorted(nodes, key=_topology) if node.slots > 0}
    if sum(left.values()) < degrees.workers:
        raise ValueError(f"{degrees.workers} workers do not fit into {sum(left.values())} places")
    unit = min(lcm(degrees.sequence, degrees.expert), degrees.workers)
    places: list[list[Node]] = []
    missing = degrees.workers
    for size in dict.fromkeys((unit, degrees.sequence, 1)):
        for node in sorted(left, key=lambda node: -left[node]):
            count = min(left[node], missing) // size
            places += [[node] * size] * count
            left[node] -= count * size
            missing -= count * size
    # Groups that are whole come first: one node's left-over places would set the others apart.
    places.sort(key=lambda group: (-len(group), _topology(group[0])))
    return [node for group in places for node in group]


def placement_rows(nodes: list[Node], degrees: Degrees) -> list[tuple[str, ...]]:
    """A line for every stretch of neighbouring ranks on one node: address, ranks, which sequence groups they are."""
    rows: list[tuple[str, ...]] = []
    first = 0
    for rank in range(1, len(nodes) + 1):
        if rank < len(nodes) and nodes[rank].id == nodes[first].id:
            continue
        groups = _span(first // degrees.sequence, (rank - 1) // degrees.sequence)
        whole = first % degrees.sequence == 0 and rank % degrees.sequence == 0
        rows.append((nodes[first].address, _span(first, rank - 1), groups if whole else f"{groups}, in part"))
        first = rank
    return rows


def workers_per_node(nodes: list[Node], degrees: Degrees) -> int | None:
    """Ranks on every node if that is one number and sequence groups are made of whole nodes, or the reverse."""
    counts = {sum(other.id == node.id for other in nodes) for node in nodes}
    size = counts.pop()
    if counts or size == len(nodes) or (size % degrees.sequence and degrees.sequence % size):
        return None
    blocks = [nodes[start : start + size] for start in range(0, len(nodes), size)]
    return size if all(len({node.id for node in block}) == 1 for block in blocks) else None


def _topology(node: Node) -> tuple[str, list[tuple[int, str]], str]:
    parts = node.address.split(".")
    return node.rack, [(int(part), "") if part.isdigit() else (0, part) for part in parts], node.id


def _largest_divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(most, 0, -1) if number % divisor == 0)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
