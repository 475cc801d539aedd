"""What one judgement of one network gives, and how sure it is.

Shapes: N test images, R resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 1000
"""Bootstrap resamples behind an interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Numbers and pictures of one network; numbers are in percent."""

    values: dict[str, float]
    """Metric -> value; the first one is the headline."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Metric -> 95% bootstrap interval over the test images, where it can be had: how far another
    draw of test images would move the value, not another training."""
    test_images: dict[str, int] = field(default_factory=dict)
    """Metric -> images that its interval is over."""
    classes: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Metric -> class -> value; None: the class occurs nowhere."""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """File name -> PNG."""
    about: dict[str, Any] = field(default_factory=dict)
    """How it was measured: numbers of images, what was chosen and by what, seconds."""


def bootstrap_interval(
    statistic: Callable[[Tensor], Tensor], num_images: int, *, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the 95% percentile interval of a statistic over resampled test images.

    Args:
        statistic: maps how often each image was drawn, (R, N) float64, to R values.
        num_images: N > 0.
        seed: of the resamples; equal seeds give equal draws for all networks.
        resamples: R in all; the statistic gets some of them at a time.
    """
    random = torch.Generator().manual_seed(seed)
    values = []
    for count in _chunks(resamples, max(1, 2**22 // num_images)):
        drawn = torch.randint(num_images, (count, num_images), generator=random)
        times = torch.zeros(count, num_images, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        values.append(statistic(times))
    low, high = torch.cat(values).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def interval_of_mean(values: Tensor, *, seed: int) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean of one value (N,) for each test image."""
    column = values.double()[:, None]  # (N, 1)
    return bootstrap_interval(
        lambda times: (times @ column).squeeze(1) / len(column), len(column), seed=seed
    )


def _chunks(total: int, most: int) -> list[int]:
    return [min(most, total - start) for start in range(0, total, most)]


def distinct_names(names: Sequence[str], numbers: Sequence[int]) -> tuple[str, ...]:
    """Return the names of classes, each once: where two are equal, the number stands behind all.

    Args:
        names: as the set gives them.
        numbers: what tells the classes apart in the set's files: labels or ids.
    """
    if len(set(names)) == len(names):
        return tuple(names)
    return tuple(f"{name} ({number})" for name, number in zip(names, numbers, strict=True))
