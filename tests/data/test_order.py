"""The arithmetic of the global order."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longstride.data.order import GlobalOrder, Permutation, Region, apportion, spread, stable_hash


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_a_permutation_is_one(size):
    values = [Permutation(size, "key", 1)(index) for index in range(size)]
    assert sorted(values) == list(range(size))
    if size > 4:
        assert values != [Permutation(size, "key", 2)(index) for index in range(size)]


def test_a_permutation_of_a_huge_range_costs_nothing():
    permutation = Permutation(10**15, "key")
    assert len({permutation(index) for index in range(500)}) == 500
    assert all(permutation(index) < 10**15 for index in range(500))


def test_small_permutations_are_all_reached():
    reached = {tuple(Permutation(3, key)(index) for index in range(3)) for key in range(200)}
    assert len(reached) == 6


def test_values_never_change():
    """Stored positions of runs mean what they meant: these numbers may not change between releases or machines."""
    assert stable_hash("order", "abc.py") == 11607775815740926403
    order = GlobalOrder([Region(0, 1000, 2), Region(1000, 1500, 1)], 64, seed=7)
    assert [order.window(index).start for index in range(6)] == [1243, 499, 489, 759, 345, 842]


@given(weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=9), total=st.integers(1, 200))
def test_apportioned_slots_add_up(weights, total):
    shares = apportion(weights, total)
    assert sum(shares) == total
    if total >= len(weights):
        assert min(shares) >= 1


def test_spread_windows_are_disjoint():
    regions = [Region(0, 100), Region(100, 130, 2), Region(130, 135)]
    windows = spread(regions, 10, 12)
    starts = sorted(window.start for window in windows)
    assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(starts))
    assert all(window.start + 10 <= window.region.stop for window in windows)
    assert spread(regions, 1000, 3) == []
