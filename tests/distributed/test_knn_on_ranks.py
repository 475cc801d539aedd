"""kNN shared by ranks gives what one process gives, ties included."""

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor

from pcd_ray.evaluate.classify.knn import knn_top1_pct, part_of

CASES = [(31, 17), (40, 8), (5, 2), (12, 12)]  # voters and test images; 2 for three ranks


def drawn(count: int, seed: int, ties: bool) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 4, generator=random)
    labels = torch.randint(3, (count,), generator=random)
    return features.sign() if ties else features, labels


def scored(rank: int, num_ranks: int) -> list[dict[int, float]]:
    """Scores of this rank, which sees the features of its own rows alone."""
    found = []
    for voters, tests in CASES:
        for ties in (False, True):
            train, train_labels = drawn(voters, 0, ties)
            mine = train[slice(*part_of(rank, num_ranks, voters))]
            test, test_labels = drawn(tests, 1, ties)
            own = test[slice(*part_of(rank, num_ranks, tests))]
            place = {"rank": rank, "num_ranks": num_ranks}
            found += [
                knn_top1_pct(mine, train_labels, own, test_labels, ks=(1, 4), **place),
                knn_top1_pct(
                    mine, train_labels, mine, train_labels, ks=(1, 4), leave_one_out=True, **place
                ),
            ]
    return found


def scored_here() -> list[dict[int, float]]:
    return scored(torch.distributed.get_rank(), torch.distributed.get_world_size())


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_score_as_one_process(ranks: int) -> None:
    alone = scored(0, 1)
    assert len({tuple(scores.values()) for scores in alone}) > 4  # the cases differ
    assert run_on_ranks(ranks, scored_here) == [alone] * ranks
