"""Which mesh fits, and who sits where: plain values, checked against every smaller mesh and drawn clusters."""

from __future__ import annotations

from itertools import product
from math import lcm

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longstride.orchestrator.arrangement import Node, arrange, fit, placement_rows, workers_per_node
from longstride.parallel import Degrees
from longstride.workers import Experiment


def experiment(
    replicate: int, data: int, sequence: int, *, batch: int, context: int = 64, experts: int = 0
) -> Experiment:
    parallel = {"replicate": replicate, "data": data, "sequence": sequence}
    layers = "[mamba, attention+moe]" if experts else "[mamba]"
    model = {"vocab_size": 256, "width": 32, "layers": layers, "attention": {"heads": 2, "kv_heads": 1}}
    if experts:
        model["moe"] = {"experts": experts, "top_k": 1, "hidden": 32}
    return Experiment.model_validate(
        {
            "workers": replicate * data * sequence,
            "model": model,
            "data": {"context": context, "batch": batch},
            "parallel": parallel,
        }
    )


def node(number: int, slots: int, rack: str = "") -> Node:
    return Node(f"n{number}", f"10.0.0.{number}", slots, slots, rack)


@pytest.mark.parametrize(
    ("wanted", "batch", "devices", "expected"),
    [
        ((1, 2, 2), 2, 4, (1, 2, 2)),
        ((1, 2, 2), 2, 3, (1, 1, 2)),  # data goes first, the sequence degree stays
        ((1, 4, 2), 4, 7, (1, 2, 2)),  # 3 groups would not divide the batch of 4
        ((1, 3, 2), 6, 5, (1, 2, 2)),
        ((1, 1, 4), 2, 3, (1, 1, 2)),  # 3 parts would not divide the context
        ((1, 1, 4), 2, 1, (1, 1, 1)),
        ((2, 2, 2), 4, 6, (1, 2, 2)),  # whole copies of the parameters go before their shards
        ((2, 2, 1), 12, 3, (1, 3, 1)),
        ((4, 2, 1), 24, 6, (3, 2, 1)),
    ],
)
def test_the_mesh_on_fewer_devices(
    wanted: tuple[int, int, int], batch: int, devices: int, expected: tuple[int, int, int]
) -> None:
    found = fit(experiment(*wanted, batch=batch), devices)
    assert found is not None
    degrees = found.degrees
    assert (degrees.replicate, degrees.data, degrees.sequence) == expected


def test_no_devices_hold_no_mesh() -> None:
    assert fit(experiment(1, 2, 2, batch=2), 0) is None


@pytest.mark.parametrize(("data", "sequence", "batch", "experts"), [*product((1, 2, 3), (1, 2, 4), (6, 12), (0, 4, 6))])
def test_every_smaller_mesh_is_valid_and_keeps_the_tokens_of_a_step(
    data: int, sequence: int, batch: int, experts: int
) -> None:
    wanted = experiment(1, data, sequence, batch=batch, experts=experts)
    sizes = []
    for devices in range(1, data * sequence + 2):
        found = fit(wanted, devices)
        assert found is not None
        again = Experiment.model_validate(found.model_dump(mode="json"))
        assert again.workers <= devices
        assert (again.data, again.train) == (wanted.data, wanted.train)
        sizes.append(again.workers)
    assert sizes == sorted(sizes), "more devices, no smaller mesh"
    assert sizes[-1] == wanted.workers


def test_a_schedule_is_planned_anew_for_fewer_devices() -> None:
    wanted = experiment(1, 1, 8, batch=1)
    data = wanted.data.model_copy(update={"schedule": "16 for 3 steps"})
    wanted = Experiment.model_validate(wanted.model_copy(update={"data": data}).model_dump())
    found = fit(wanted, 7)
    assert found is not None and found.workers == 4, "neither 7, 6 nor 5 divide the contexts"
    degrees = [found.at(stage).degrees for stage in found.stages]
    assert [(each.data, each.sequence) for each in degrees] == [(4, 1), (1, 4)]


@given(st.lists(st.integers(0, 8), min_size=1, max_size=6), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]))
def test_groups_stay_inside_nodes_where_they_can(slots: list[int], sequence: int, expert: int) -> None:
    nodes = [node(number, count) for number, count in enumerate(slots)]
    unit = lcm(sequence, expert)
    copies = sum(slots) // unit * unit // sequence
    if not copies:
        with pytest.raises(ValueError, match="do not fit"):
            arrange(nodes, Degrees(1, 1, sum(slots) + 1))
        return
    degrees = Degrees(1, copies, sequence, expert)
    ranks = arrange(nodes, degrees)
    assert len(ranks) == degrees.workers
    assert all(ranks.count(place) <= place.slots for place in nodes)
    for size in {sequence, unit}:
        groups = [ranks[start : start + size] for start in range(0, len(ranks), size)]
        whole = sum(len(set(group)) == 1 for group in groups)
        if size == unit:
            assert whole == min(len(groups), sum(count // size for count in slots))


def test_neighbours_in_rank_are_neighbours_in_the_rack() -> None:
    nodes = [node(1, 2, "b"), node(2, 2, "a"), node(10, 2, "b"), node(3, 2, "a")]
    ranks = arrange(nodes, Degrees(1, 4, 2))
    assert [place.address for place in ranks[::2]] == ["10.0.0.2", "10.0.0.3", "10.0.0.1", "10.0.0.10"]
    assert workers_per_node(ranks, Degrees(1, 4, 2)) == 2


def test_a_group_too_large_for_a_node_takes_few_and_full_ones() -> None:
    ranks = arrange([node(1, 1), node(2, 4), node(3, 4), node(4, 3)], Degrees(1, 1, 8))
    assert placement_rows(ranks, Degrees(1, 1, 8)) == [
        ("10.0.0.2", "0-3", "0, in part"),
        ("10.0.0.3", "4-7", "0, in part"),
    ]
    assert workers_per_node(ranks, Degrees(1, 1, 8)) == 4
    assert workers_per_node(arrange([node(1, 3), node(2, 3)], Degrees(1, 3, 2)), Degrees(1, 3, 2)) is None
    assert workers_per_node(arrange([node(1, 4)], Degrees(1, 2, 2)), Degrees(1, 2, 2)) is None
