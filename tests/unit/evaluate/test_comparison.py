"""Means and intervals of measurements against closed forms."""

import math

import pytest
from scipy.stats import t

from pcd_ray.evaluate.comparison import Estimate, compare, estimate, plain
from pcd_ray.evaluate.scores import Scores


def of(*values: float, interval: tuple[float, float] | None = None) -> list[Scores]:
    """Judging seeds of one training."""
    intervals = {} if interval is None else {"m": interval}
    images = {} if interval is None else {"m": 120}
    return [Scores(values={"m": v}, intervals=intervals, test_images=images) for v in values]


def estimated(*trainings: list[Scores]) -> Estimate:
    found = estimate(trainings, "m")
    assert found is not None
    return found


def test_three_trainings_have_students_interval() -> None:
    found = estimated(of(10.0), of(12.0, interval=(1, 2)), of(14.0))
    half = 4.302653 * 2 / math.sqrt(3)  # t(2) x standard deviation / sqrt(n)
    assert (found.value, found.over_count, found.over) == (12, 3, "trainings")
    assert found.low == pytest.approx(12 - half, abs=1e-3)
    assert found.high == pytest.approx(12 + half, abs=1e-3)
    assert str(found) == f"12.0 +- {half:.1f}"


def test_judging_a_training_again_adds_no_training() -> None:
    """Repeating each measurement leaves the interval as it is; pooled, it would shrink."""
    once = estimated(of(10.0), of(12.0), of(14.0))
    again = estimated(of(10.0, 10.0), of(11.0, 13.0), of(14.0, 14.0, 14.0, 14.0))
    assert (again.value, again.low, again.high) == (once.value, once.low, once.high)
    assert (again.trainings, again.measurements, again.over_count) == (3, 8, 3)
    assert again.basis == "3 trainings, means of judging seeds"
    assert once.basis == "3 trainings"


def test_seeds_of_one_training_have_an_interval_of_their_own() -> None:
    found = estimated(of(10.0, 12.0, 14.0), [])
    assert (found.value, found.trainings) == (12, 1)
    assert found.basis == "3 judging seeds, 1 of 2 trainings missing"
    assert found.high == pytest.approx(12 + 4.302653 * 2 / math.sqrt(3), abs=1e-3)


@pytest.mark.parametrize("count", [2, 3, 8, 10, 11, 12, 20, 31, 200])
def test_quantiles_are_those_of_the_distribution(count: int) -> None:
    """The interval of 0 .. n-1 has half-width t(n-1) times a known spread."""
    spread = math.sqrt(count * (count + 1) / 12)  # of 0 .. n-1, with n - 1 below
    found = estimated(*(of(float(index)) for index in range(count)))
    assert found.high is not None
    half = float(t.ppf(0.975, count - 1)) * spread / math.sqrt(count)
    assert found.high - found.value == pytest.approx(half, rel=1e-4)


def test_one_measurement_keeps_its_own_interval() -> None:
    found = estimated(of(30.0, interval=(25.0, 36.0)))
    assert str(found) == "30.0 [25.0, 36.0]", "no +-: it is not symmetric"
    assert found.basis == "120 test images"
    bare = estimated(of(30.0))
    assert (str(bare), bare.basis) == ("30.0", "")


def test_a_metric_that_a_row_lacks_is_left_open() -> None:
    one = Scores(
        values={"miou": 5.0, "test_miou": 4.0},
        intervals={"miou": (4.0, 6.5)},
        test_images={"miou": 9},
    )
    rows = {
        "a": [[Scores(values={"miou": 1.0})], [Scores(values={"miou": 3.0})]],
        "b": [[one]],
        "c": [[]],
    }
    table = compare(rows)
    assert table["miou"]["a"].value == 2
    assert list(table["test_miou"]) == ["b"]
    assert plain(table) == [
        {"student": "a", "miou": "2.0 +- 12.7", "test_miou": "-", "95% over": "2 trainings"},
        {
            "student": "b",
            "miou": "5.0 [4.0, 6.5]",
            "test_miou": "4.0",
            "95% over": "9 test images",
        },
    ]
