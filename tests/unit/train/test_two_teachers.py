"""The loop with two teachers."""

from collections.abc import Iterator

import pytest
import torch
from loop_parts import loop_settings, new_state, steps_of

from pcd_ray.checkpoint import to_host
from pcd_ray.train.state import TrainState

WIDTHS, WEIGHTS = (6, 5), (0.5, 2.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute small things on one thread, and in one order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def two_teachers() -> TrainState:
    return new_state(batchnorm=True, dropout=0.2, ema=0.9, widths=WIDTHS, weights=WEIGHTS)


def test_stopping_and_going_on_with_two_queues_changes_no_bit() -> None:
    settings = loop_settings(steps=6)
    straight, first, second = two_teachers(), two_teachers(), two_teachers()
    list(steps_of(straight, settings, stop=6))
    list(steps_of(first, settings, stop=3))
    second.load_state_dict(to_host(first.state_dict()))
    torch.manual_seed(99)
    list(steps_of(second, settings, stop=6))
    for one, other in zip(straight.branches, second.branches, strict=True):
        assert torch.equal(one.queue.negatives, other.queue.negatives)
        assert one.queue.num_pushed == other.queue.num_pushed == 48
    expected, found = straight.state_dict(), second.state_dict()
    for network in ("student", "average"):
        for name, value in expected[network].items():
            assert torch.equal(found[network][name], value), name
    assert [len(queue["negatives"][0]) for queue in found["queues"]] == list(WIDTHS)


def test_another_number_of_teachers_than_stored_is_no_state_of_this_run() -> None:
    stored = to_host(two_teachers().state_dict())
    with pytest.raises((RuntimeError, ValueError)):
        new_state(batchnorm=True, ema=0.9).load_state_dict(stored)


def test_the_loss_that_is_logged_is_the_sum_of_those_of_the_teachers() -> None:
    settings = loop_settings(steps=4, log_every_steps=2, accumulation_steps=2)
    *_, done = steps_of(two_teachers(), settings, stop=4)
    assert done.metrics is not None
    own = [done.metrics[f"train/loss_{number}"] for number in (1, 2)]
    total = WEIGHTS[0] * own[0] + WEIGHTS[1] * own[1]
    assert done.metrics["train/loss"] == pytest.approx(total, rel=1e-6)
    assert done.metrics["train/pixel_top1_pct"] != done.metrics["train/pixel_top1_pct_2"]
    alone = new_state(batchnorm=True)
    *_, done = steps_of(alone, loop_settings(steps=1), stop=1)
    assert done.metrics is not None
    assert not [name for name in done.metrics if name.endswith(("_1", "_2"))]
