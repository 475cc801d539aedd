"""Means and intervals of measurements against closed forms."""

import math

import pytest

from pcd_ray.evaluate.comparison import compare, estimate, plain
from pcd_ray.evaluate.scores import Scores


def test_three_seeds_have_students_interval() -> None:
    found = estimate([10.0, 12.0, 14.0], [None, (1, 2), None])
    half = 4.302653 * 2 / math.sqrt(3)  # t(2) x standard deviation / sqrt(n)
    assert (found.value, found.count, found.over) == (12, 3, "seeds")
    assert found.low == pytest.approx(12 - half, abs=1e-3)
    assert found.high == pytest.approx(12 + half, abs=1e-3)
    assert str(found) == f"12.0 +- {half:.1f}"


def test_quantiles_are_those_of_the_distribution() -> None:
    """The interval of [0, 2] x n has half-width t(n-1) times a known spread."""
    known = {2: 12.7062, 5: 2.7764, 8: 2.3646, 10: 2.2622}
    for count, quantile in known.items():
        values = [float(index) for index in range(count)]
        spread = math.sqrt(count * (count + 1) / 12)  # of 0 .. n-1, with n - 1 below
        found = estimate(values, [None] * count)
        assert found.high is not None
        assert found.high - found.value == pytest.approx(
            quantile * spread / math.sqrt(count), rel=1e-3
        )


def test_one_measurement_keeps_its_own_interval() -> None:
    assert str(estimate([30.0], [(25.0, 36.0)])) == "30.0 +- 5.5"
    assert estimate([30.0], [(25.0, 36.0)]).over == "test images"
    assert str(estimate([30.0], [None])) == "30.0"


def test_a_metric_that_a_row_lacks_is_left_open() -> None:
    rows = {
        "a": [Scores(values={"miou": 1.0}), Scores(values={"miou": 3.0})],
        "b": [Scores(values={"miou": 5.0, "test_miou": 4.0}, intervals={"miou": (4.0, 6.0)})],
    }
    table = compare(rows)
    assert table["miou"]["a"].value == 2
    assert list(table["test_miou"]) == ["b"]
    assert plain(table) == [
        {"student": "a", "miou": "2.0 +- 12.7", "test_miou": "-"},
        {"student": "b", "miou": "5.0 +- 1.0", "test_miou": "4.0"},
    ]
