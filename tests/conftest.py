"""Which tests run by themselves: `make test` runs all others two at a time first."""

from pathlib import Path

import pytest

from .timing import TRIES, OutOfTime

# Real servers, some told to answer within tenths of a second.
FAULTS = Path(__file__).parent / "faults"


@pytest.hookimpl(tryfirst=True)  # before -m reads the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        timing = item.get_closest_marker("timing") is not None
        if timing:
            item.add_marker(pytest.mark.flaky(reruns=TRIES - 1, only_rerun=[OutOfTime.__name__]))
        if timing or item.path.is_relative_to(FAULTS):
            item.add_marker("alone")
