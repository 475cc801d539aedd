"""Several measurements of one network, and several networks side by side.

Shapes: n measurements of one row: seeds of its training, of its judging, or both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from pcd_ray.evaluate.scores import Scores

# Student's t, 97.5% quantile, by degrees of freedom; beyond them the normal one is within 0.27.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value in percent and how sure it is."""

    value: float
    """Mean over the measurements."""
    low: float | None
    high: float | None
    """95% interval; None: nothing is known of it."""
    count: int
    """Measurements behind it."""
    over: str
    """What the interval is over: ``seeds``, ``test images`` or ``""``."""

    def __str__(self) -> str:
        """Return the value and half the width of its interval."""
        if self.low is None or self.high is None:
            return f"{self.value:.1f}"
        return f"{self.value:.1f} +- {(self.high - self.low) / 2:.1f}"


def estimate(values: Sequence[float], intervals: Sequence[tuple[float, float] | None]) -> Estimate:
    """Return the mean of n measurements with its 95% interval.

    Two and more measurements give Student's interval of their mean: how far other seeds would
    move it. A single one has its own interval over test images, where there is one.

    Args:
        values: n > 0 measurements.
        intervals: of each of them, or None.
    """
    count = len(values)
    mean = fmean(values)
    if count == 1:
        low, high = intervals[0] or (None, None)
        return Estimate(mean, low, high, 1, "test images" if intervals[0] else "")
    quantile = _T[count - 2] if count - 2 < len(_T) else 1.96
    half = quantile * stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count, "seeds")


def compare(rows: Mapping[str, Sequence[Scores]]) -> dict[str, dict[str, Estimate]]:
    """Return metric -> row -> estimate, metrics in the order of the first row's.

    A row without a metric has no entry there.

    Args:
        rows: label -> the measurements of the row, at least one.
    """
    metrics = list(dict.fromkeys(m for scores in rows.values() for s in scores for m in s.values))
    table: dict[str, dict[str, Estimate]] = {metric: {} for metric in metrics}
    for label, measured in rows.items():
        for metric in metrics:
            having = [scores for scores in measured if metric in scores.values]
            if having:
                table[metric][label] = estimate(
                    [scores.values[metric] for scores in having],
                    [scores.intervals.get(metric) for scores in having],
                )
    return table


def plain(table: Mapping[str, Mapping[str, Estimate]]) -> list[dict[str, Any]]:
    """Return a comparison as one mapping per row, for a terminal and for JSON."""
    labels = dict.fromkeys(label for estimates in table.values() for label in estimates)
    return [
        {"student": label}
        | {metric: str(of[label]) if label in of else "-" for metric, of in table.items()}
        for label in labels
    ]
