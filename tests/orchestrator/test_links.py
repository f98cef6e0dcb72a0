"""Jobs over two nodes in network namespaces of their own: a link that is cut, a node that is to be taken away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .network import HEAD, PREFIX, Network, allowed, network
from .nodes import Nodes, cluster, wait_until
from .test_cluster import command, compare, info, recorded, starts, submit, undisturbed, wait_for_start, wait_for_step

pytestmark = [
    pytest.mark.alone,
    pytest.mark.slow,
    pytest.mark.soak,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not allowed(), reason="network namespaces need root and iproute2"),
]

ONE, TWO, THREE = (f"{PREFIX}.{number}" for number in (2, 3, 4))


@pytest.fixture(scope="module")
def links() -> Iterator[Network]:
    with network(ONE, TWO, THREE) as made:
        yield made


@pytest.fixture(scope="module")
def nodes(links: Network) -> Iterator[Nodes]:
    with cluster(ONE, TWO, head=HEAD, network=links) as started:
        yield started


def wait_for_start_with(nodes: Nodes, address: str, run: Path, number: int) -> None:
    """As whoever keeps a node up, such as Kubernetes: one whose `ray start` gave up is started again."""

    def reached() -> bool:
        nodes.revive(address)
        return starts(run) >= number

    wait_until(reached, f"start {number} with {address}")


def test_a_job_goes_on_when_a_link_is_cut_and_when_a_node_is_drained(nodes: Nodes, links: Network, place: Path) -> None:
    """Without closing a connection, the cut leaves both sides waiting; the losses stay the undisturbed run's."""
    run = place / "runs" / "cut"
    with undisturbed(place) as peace:
        job = submit(nodes, "run.name=cut", "recovery.wait_seconds=300", directory=place)
        wait_until(lambda: recorded(run) >= 15, "step 15", 400)
        links.cut(TWO)
        wait_for_start(run, 2)
        wait_for_step(run, info(run)["starts"][1]["step"] + 5)
        links.mend(TWO)
        nodes.forget(TWO)
        nodes.add(TWO)
        wait_for_start_with(nodes, TWO, run, 3)
        wait_for_step(run, info(run)["starts"][2]["step"] + 5)
        told, began = nodes.preempt(TWO), time.monotonic()
        wait_for_start(run, 4)
        assert told.wait(60) is not None and time.monotonic() - began < 240, "it ends once the run has left it"
        nodes.add(THREE)
        wait_for_start_with(nodes, THREE, run, 5)
        wait_for_step(run, info(run)["starts"][4]["step"] + 5)
        assert command(nodes, "stop", job, directory=place).code == 0
        compare(run, peace, same_mesh=info(run)["starts"][1]["step"])
    assert [entry["workers"] for entry in info(run)["starts"]] == [2, 1, 2, 1, 2]
    (cause,) = (entry["cause"] for entry in info(run)["failures"])
    assert "worker 1" in cause or "no step for" in cause
    log = command(nodes, "logs", job, directory=place).stdout
    assert f"node {TWO} is about to leave: writing a checkpoint and moving" in log
    steps = [entry["step"] for entry in info(run)["starts"]]
    assert steps == sorted(steps)
