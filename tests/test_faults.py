"""The short form of the campaign of faults (`python tests/faults.py`): what reads a finished run, disturbed."""

import faults
import pytest


@pytest.fixture(scope="module")
def world(finished, tmp_path_factory):
    return faults.World(tmp_path_factory.mktemp("faults"), finished[0])


@pytest.mark.parametrize(
    ("fault", "times"),
    [
        ("kill", 3), ("term", 1), ("flip", 4), ("spoiled", 3), ("hostile", 4),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (
            ("kill", 6), ("term", 3), ("flip", 8), ("spoiled", 6), ("hostile", 8),
        )),
    ],
)  # fmt: skip
def test_nothing_is_lost_and_nothing_wrong_is_taken(world, fault, times, capsys):
    counts = faults.campaign(world, [fault], times, seed=1000)[fault]
    assert not counts["WRONG"], capsys.readouterr().out
    assert sum(counts.values()) == times
