"""The nodes of a Ray cluster, and places on them reserved for the workers of a run."""

from __future__ import annotations

import contextlib
import functools
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, cast

import ray
from ray._private.state import available_resources_per_node, state
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..parallel import Degrees
from .arrangement import Node, arrange, placement_rows, workers_per_node
from .tables import columns

Device = Literal["cpu", "cuda"]
RESOURCE = {"cpu": "CPU", "cuda": "GPU"}
BUNDLE: dict[Device, dict[str, float]] = {"cpu": {"CPU": 1.0}, "cuda": {"CPU": 1.0, "GPU": 1.0}}
# The operator's label for nodes that are close to each other: `ray start --labels rack=r1`.
RACK_LABEL = "rack"
NODE_LABEL = "ray.io/node-id"
# A node that was lost is listed for some 10 s more; its raylet does not take a connection.
PROBE_SECONDS = 2.0
# From reserving places that are free to having them.
RESERVE_SECONDS = 15.0
# A node that has not said by then how much memory its GPUs have is taken as it is.
MEMORY_SECONDS = 20.0


@dataclass(frozen=True)
class Placement:
    """Places for the workers: bundle number `rank` of `group`, on `nodes[rank]`."""

    group: PlacementGroup
    nodes: tuple[Node, ...]
    device: Device
    degrees: Degrees

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(node.address for node in self.nodes)

    @property
    def node_size(self) -> int | None:
        """See `workers_per_node`."""
        return workers_per_node(list(self.nodes), self.degrees)

    def table(self) -> str:
        """What was placed where, a line for every node."""
        return columns(("NODE", "RANKS", "SEQUENCE GROUPS"), placement_rows(list(self.nodes), self.degrees))


class Taken(Exception):
    """The places were gone before they could be reserved."""


def usable_nodes(device: Device) -> list[Node]:
    """The nodes that answer and are not about to leave, with the places that are free on each."""
    leaving = draining()
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    free: dict[str, dict[str, float]] = available_resources_per_node()
    with ThreadPoolExecutor(max(1, len(alive))) as pool:
        there = [node for node, answers in zip(alive, pool.map(_answers, alive), strict=True) if answers]
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            _places(free.get(node["NodeID"], {}), device),
            _places(node["Resources"], device),
            node.get("Labels", {}).get(RACK_LABEL, ""),
            int(node["Resources"].get("memory", 0)),
        )
        for node in there
    ]


def room(places: list[Node], device: Device) -> int | None:
    """Bytes that every worker has for itself, at the least, with a worker on each of `places`; None: nobody knows.

    On a GPU its own memory, on a CPU an equal share of the node's.
    """
    if device == "cuda":
        shares = [_gpu_memory(node.id) for node in set(places)]
    else:
        shares = [node.memory // places.count(node) for node in set(places)]
    return min((share for share in shares if share), default=None)


@functools.cache
def _gpu_memory(node_id: str) -> int:
    """Of the node's smallest GPU, as the node itself says; 0: it does not."""
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    try:
        return ray.get(_ASK_GPUS.options(scheduling_strategy=there).remote(), timeout=MEMORY_SECONDS)
    except RayError:
        return 0


def smallest_gpu() -> int:
    """Bytes of this machine's smallest GPU, seen by this process or not; 0 where there is none."""
    words = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(words, capture_output=True, text=True, check=True, timeout=MEMORY_SECONDS).stdout
        return min(int(line) for line in listed.split()) << 20
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


# Beside a place for a worker, none of its own: it takes a moment.
_ASK_GPUS: Any = cast(Any, ray.remote)(num_cpus=0)(smallest_gpu)


def answers(node_id: str) -> bool:
    """Whether the node's raylet takes a connection."""
    return any(_answers(node) for node in ray.nodes() if node["NodeID"] == node_id and node["Alive"])


def draining() -> dict[str, int]:
    """Nodes that are about to leave (preempted, scaled down) and when, in milliseconds since 1970; 0: unknown."""
    return state.get_draining_nodes()


@contextlib.contextmanager
def reserved(nodes: list[Node], degrees: Degrees, device: Device) -> Iterator[Placement]:
    """Reserves a place for every worker of a mesh and gives them back on leaving. Raises Taken when they are gone."""
    where = arrange(nodes, degrees)
    group = placement_group(
        [BUNDLE[device]] * len(where), bundle_label_selector=[{NODE_LABEL: node.id} for node in where]
    )
    try:
        if not group.wait(RESERVE_SECONDS):
            raise Taken
        yield Placement(group, tuple(where), device, degrees)
    finally:
        if ray.is_initialized():
            remove_placement_group(group)


def _places(resources: dict[str, float], device: Device) -> int:
    """A GPU for every worker takes a CPU as well."""
    return int(min(resources.get("CPU", 0), resources.get(RESOURCE[device], 0)))


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), PROBE_SECONDS).close()
    except OSError:
        return False
    return True
