"""Several measurements of several networks of a row, and rows side by side.

A row has trainings (networks that differ in their seed alone), a training has measurements (seeds
of what is trained to judge it). Measurements of one training are no further trainings: they are
averaged before trainings are compared.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean, stdev
from typing import Any

from pcd_ray.evaluate.scores import Scores

# Student's t, 97.5% quantile, of 1 to 9 degrees of freedom; `_quantile` computes the others.
_T = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.306, 2.26216)

TRAININGS = "trainings"
JUDGING_SEEDS = "judging seeds"
TEST_IMAGES = "test images"

Measured = Sequence[Sequence[Scores]]
"""Training -> judging seed -> scores; one of which nothing could be judged is empty."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value in percent and how sure it is."""

    value: float
    """Mean over trainings of the mean over judging seeds."""
    low: float | None
    high: float | None
    """95% interval; None: nothing is known of it."""
    over: str
    """What the interval is over: `TRAININGS`, `JUDGING_SEEDS`, `TEST_IMAGES` or ``""``."""
    over_count: int
    """How many of them; 0: nothing, or nobody has said."""
    trainings: int
    measurements: int
    """Behind the value, of all trainings."""
    missing: int = 0
    """Trainings of the row that could not be judged."""

    def __str__(self) -> str:
        """Return the value with its interval: a bootstrap's is not symmetric."""
        if self.low is None or self.high is None:
            return f"{self.value:.1f}"
        if self.over == TEST_IMAGES:
            return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"
        return f"{self.value:.1f} +- {(self.high - self.low) / 2:.1f}"

    @property
    def basis(self) -> str:
        """What the interval is over, in words, and which trainings are missing."""
        said = []
        if self.over:
            said.append(f"{self.over_count:,} {self.over}" if self.over_count else self.over)
        if self.over == TRAININGS and self.measurements > self.trainings:
            said.append("means of judging seeds")
        if self.missing:
            said.append(f"{self.missing} of {self.missing + self.trainings} trainings missing")
        return ", ".join(said)


def estimate(measured: Measured, metric: str) -> Estimate | None:
    """Return the mean of a row's metric with its 95% interval; None: no measurement has it.

    Two and more trainings give Student's interval over trainings: how far others would move it.
    One training gives that over its judging seeds, where there are two and more, and a single
    measurement its own interval over test images, where there is one.

    Args:
        measured: of the row.
        metric: which one.
    """
    found = _estimate(
        [
            [scores for scores in training if metric in scores.values]
            for training in measured
            if any(metric in scores.values for scores in training)
        ],
        metric,
    )
    return found and replace(found, missing=len(measured) - found.trainings)


def _estimate(measured: Measured, metric: str) -> Estimate | None:
    """Return the estimate of trainings and measurements that all have the metric."""
    if not measured:
        return None
    means = [fmean(scores.values[metric] for scores in training) for training in measured]
    if len(means) > 1:
        return _student(means, TRAININGS, len(means), sum(map(len, measured)))
    values = [scores.values[metric] for scores in measured[0]]
    if len(values) > 1:
        return _student(values, JUDGING_SEEDS, 1, len(values))
    (scores,) = measured[0]
    interval = scores.intervals.get(metric)
    if interval is None:
        return Estimate(values[0], None, None, "", 0, 1, 1)
    images = scores.test_images.get(metric, 0)
    return Estimate(values[0], *interval, TEST_IMAGES, images, 1, 1)


def compare(rows: Mapping[str, Measured]) -> dict[str, dict[str, Estimate]]:
    """Return metric -> row -> estimate, metrics in the order of the first row's.

    A row without a metric has no entry there.

    Args:
        rows: label -> the measurements of the row.
    """
    metrics = dict.fromkeys(
        metric
        for measured in rows.values()
        for training in measured
        for scores in training
        for metric in scores.values
    )
    table: dict[str, dict[str, Estimate]] = {metric: {} for metric in metrics}
    for label, measured in rows.items():
        for metric in metrics:
            found = estimate(measured, metric)
            if found is not None:
                table[metric][label] = found
    return table


def bases(table: Mapping[str, Mapping[str, Estimate]], label: str) -> str:
    """Return what the intervals of a row are over, in words."""
    said = dict.fromkeys(of[label].basis for of in table.values() if label in of)
    return "; ".join(basis for basis in said if basis) or "-"


def plain(table: Mapping[str, Mapping[str, Estimate]]) -> list[dict[str, Any]]:
    """Return a comparison as one mapping per row, for a terminal and for JSON."""
    labels = dict.fromkeys(label for estimates in table.values() for label in estimates)
    return [
        {"student": label}
        | {metric: str(of[label]) if label in of else "-" for metric, of in table.items()}
        | {"95% over": bases(table, label)}
        for label in labels
    ]


def _student(values: Sequence[float], over: str, trainings: int, measurements: int) -> Estimate:
    mean = fmean(values)
    half = _quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, over, len(values), trainings, measurements)


def _quantile(degrees: int) -> float:
    """Return Student's t, 97.5%; above 9 degrees by Fisher's expansion, exact to 1e-4."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z: float = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / float(degrees) ** power for power, term in enumerate(terms, start=1))
