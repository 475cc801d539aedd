"""Bootstrap intervals against the closed form, and that equal seeds give equal draws."""

import pytest
import torch

from pcd_ray.evaluate.scores import bootstrap_interval, interval_of_mean


def test_interval_of_a_share_is_the_binomials() -> None:
    hits = 100 * (torch.arange(400) < 120).double()
    low, high = interval_of_mean(hits, seed=0)
    half = 1.96 * 100 * (0.3 * 0.7 / 400) ** 0.5  # normal approximation, 4.5 points
    assert low == pytest.approx(30 - half, abs=0.6)
    assert high == pytest.approx(30 + half, abs=0.6)


def test_constant_values_have_no_width() -> None:
    assert interval_of_mean(torch.full((7,), 42.0), seed=3) == pytest.approx((42.0, 42.0))


def test_each_resample_draws_as_many_images_as_there_are() -> None:
    seen = []

    def statistic(times: torch.Tensor) -> torch.Tensor:
        seen.append(times)
        return times.sum(dim=1)

    assert bootstrap_interval(statistic, 50, seed=0) == (50, 50)
    drawn = torch.cat(seen)
    assert drawn.shape == (1000, 50)
    assert drawn.mean(dim=0) == pytest.approx(torch.ones(50).double(), abs=0.15)


def test_equal_seeds_give_equal_intervals() -> None:
    values = torch.randn(60, generator=torch.Generator().manual_seed(0))
    assert interval_of_mean(values, seed=1) == interval_of_mean(values, seed=1)
    assert interval_of_mean(values, seed=1) != interval_of_mean(values, seed=2)
