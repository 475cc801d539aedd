import pytest
import torch
from ranks import run_on_ranks
from tiny import unit_rows
from torch import Tensor

from pcd_ray.data.plan import rank_sizes
from pcd_ray.distill.feature_queue import FeatureQueue, gather_rows

BATCHES = [4, 2, 6, 14, 4]  # global rows of each push: inside, over the end, more than all of it


def new_queue() -> FeatureQueue:
    return FeatureQueue(11, 5, seed=0, device=torch.device("cpu"))


def keys_of(index: int) -> Tensor:
    return unit_rows(index, BATCHES[index], 5, torch.float32)


def push_own_part(dtype: torch.dtype) -> tuple[Tensor, int, int]:
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    queue = new_queue()
    for index in range(len(BATCHES)):
        gathered = gather_rows(keys_of(index).to(dtype).chunk(count)[rank])
        assert gathered.dtype == dtype
        queue.push(gathered)
    return queue.negatives, queue.cursor, queue.num_pushed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_queues_of_two_ranks_are_bit_equal_and_those_of_one_process(dtype: torch.dtype) -> None:
    alone = new_queue()
    for index in range(len(BATCHES)):
        alone.push(keys_of(index))
    for negatives, cursor, num_pushed in run_on_ranks(2, push_own_part, dtype):
        assert torch.equal(negatives, alone.negatives)
        assert (cursor, num_pushed) == (alone.cursor, alone.num_pushed)


def push_unequal_parts() -> tuple[Tensor, list[int]]:
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    queue, told = new_queue(), []
    for index in range(len(BATCHES)):
        keys = keys_of(index)
        sizes = [1, 0, len(keys) - 1] if index == 1 else rank_sizes(count, max(count, len(keys)))
        sizes[-1] += len(keys) - sum(sizes)
        gathered = gather_rows(keys.split(sizes)[rank], sizes)
        told.append(len(gathered))
        queue.push(gathered)
    return queue.negatives, told


def test_queues_of_three_ranks_with_unequal_parts_are_those_of_one_process() -> None:
    alone = new_queue()
    for index in range(len(BATCHES)):
        alone.push(keys_of(index))
    for negatives, told in run_on_ranks(3, push_unequal_parts):
        assert torch.equal(negatives, alone.negatives)
        assert told == BATCHES


def fail_on_rank_one() -> Tensor:
    if torch.distributed.get_rank() == 1:
        raise ValueError("rank one gives up")
    return gather_rows(torch.ones(1, 1))  # waits for rank one


def test_a_rank_that_fails_is_heard_while_the_other_waits() -> None:
    with pytest.raises(RuntimeError, match=r"rank one gives up|Connection (closed|reset) by peer"):
        run_on_ranks(2, fail_on_rank_one)
