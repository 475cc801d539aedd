import copy

import numpy as np
import pytest
import reference
import torch
from tiny import unit_rows
from torch import Tensor

from pcd_ray.distill.feature_queue import FeatureQueue, gather_rows

CPU = torch.device("cpu")


def new_queue(size: int = 5, width: int = 4, seed: int = 0) -> FeatureQueue:
    return FeatureQueue(size, width, seed=seed, device=CPU)


def oldest_first(queue: FeatureQueue) -> Tensor:
    return queue.negatives.roll(-queue.cursor, dims=0)


def test_it_starts_as_unit_vectors_that_the_seed_alone_decides() -> None:
    queue = new_queue(512, 64, seed=3)
    torch.testing.assert_close(queue.negatives.norm(dim=1), torch.ones(512))
    torch.manual_seed(99)  # what others drew does not matter
    assert torch.equal(queue.negatives, new_queue(512, 64, seed=3).negatives)
    assert not torch.equal(queue.negatives, new_queue(512, 64, seed=4).negatives)
    # random directions in 64 dimensions: cosines of mean 0 and deviation 1 / 8
    cosines = queue.negatives @ queue.negatives.T
    off = cosines[~torch.eye(512, dtype=torch.bool)]
    assert abs(float(off.mean())) < 0.01
    assert float(off.std()) == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize(
    "sizes", [[1], [2, 2, 2], [3, 4], [5], [5, 1], [7], [2, 13, 3], [10], [0, 1]]
)
def test_it_drops_the_oldest_for_batches_of_any_size(sizes: list[int]) -> None:
    queue = new_queue()
    expected = list(queue.negatives.numpy().copy())
    for index, size in enumerate(sizes):
        keys = unit_rows(index + 1, size, 4, torch.float32)
        queue.push(keys)
        expected = reference.push(expected, list(keys.numpy()))
        np.testing.assert_array_equal(oldest_first(queue).numpy(), np.stack(expected))
    assert queue.num_pushed == sum(sizes)
    assert queue.fill == min(1.0, sum(sizes) / 5)


@pytest.mark.parametrize("split", [[17], [1] * 17, [4, 4, 4, 5], [16, 1], [6, 11]])
def test_any_split_of_the_same_keys_gives_the_same_queue(split: list[int]) -> None:
    keys = unit_rows(1, 17, 4, torch.float32)
    whole, parts = new_queue(), new_queue()
    whole.push(keys)
    for part in keys.split(split):
        parts.push(part)
    assert torch.equal(whole.negatives, parts.negatives)
    assert (whole.cursor, whole.num_pushed) == (parts.cursor, parts.num_pushed)


def test_a_stored_queue_goes_on_as_the_first() -> None:
    first, second = new_queue(seed=1), new_queue(seed=2)
    first.push(unit_rows(1, 3, 4, torch.float32))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for queue in (first, second):
        queue.push(unit_rows(2, 4, 4, torch.float32))
    assert torch.equal(first.negatives, second.negatives)
    assert (first.cursor, first.num_pushed, first.fill) == (second.cursor, 7, 1.0)


def test_keys_are_stored_as_the_queue_is() -> None:
    queue = new_queue()
    keys = unit_rows(1, 2, 4)
    queue.push(keys)
    assert queue.negatives.dtype == torch.float32
    assert torch.equal(queue.negatives[:2], keys.float())


def test_one_process_gathers_its_own_rows() -> None:
    rows = unit_rows(1, 3, 4)
    assert gather_rows(rows) is rows
