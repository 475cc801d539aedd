"""k-nearest-neighbour classification on frozen features (cosine, weighted votes).

Shapes: N training images, M test images, C channels, L labels, k neighbours.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pcd_ray.distill.feature_queue import gather_rows
from pcd_ray.errors import ConfigError, ShardError
from pcd_ray.evaluate.features import check_finite

TEMPERATURE = 0.07
"""Of the votes, as the field has it."""
_MAX_CHUNK_VALUES = 2**24  # 64 MiB of float32 similarities at a time
_MAX_VOTERS = 2**18  # compared at a time; more are merged block by block


def part_of(rank: int, num_ranks: int, count: int) -> tuple[int, int]:
    """Return the rows [start, stop) of ``count`` whose features a rank computes."""
    return rank * count // num_ranks, (rank + 1) * count // num_ranks


def knn_top1_pct(  # noqa: PLR0913 - as of `knn_hits`
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
    leave_one_out: bool = False,
    rank: int = 0,
    num_ranks: int = 1,
) -> dict[int, float]:
    """Return the top-1 accuracy in percent for each number of neighbours in ``ks``.

    A collective over ``num_ranks`` ranks: each gives the features of its own rows, as `part_of`
    has them, on its device, and the labels of all rows. It classifies its own test images by all
    training images, and the ranks add up their hits: the same as one rank with all rows gets.

    Arguments and errors are otherwise those of `knn_hits`.
    """
    parts = [part_of(each, num_ranks, len(train_labels)) for each in range(num_ranks)]
    start, stop = part_of(rank, num_ranks, len(test_labels))
    hits = torch.zeros(len(ks), dtype=torch.int64, device=test_features.device)
    voters = gather_rows(train_features, [stop - start for start, stop in parts])
    if start < stop or len(test_labels) == 0:  # of few images some ranks have none
        found = knn_hits(
            voters,
            train_labels,
            test_features,
            test_labels[start:stop],
            ks=ks,
            temperature=temperature,
            leave_one_out=leave_one_out,
            first_row=start,
        )
        hits = torch.stack([right.sum() for right in found.values()]).to(hits.device)
    if num_ranks > 1:
        dist.all_reduce(hits)
    return {k: 100 * right / len(test_labels) for k, right in zip(ks, hits.tolist(), strict=True)}


def knn_hits(  # noqa: PLR0913 - two labelled sets, and how they are compared
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
    device: torch.device | None = None,
    leave_one_out: bool = False,
    first_row: int = 0,
) -> dict[int, Tensor]:
    """Return which test images are classified rightly, (M,) bool, for each k in ``ks``.

    A neighbour's vote weighs exp(cosine / temperature). Ties are settled by rule: the earlier
    training row is the nearer neighbour, the smaller label wins the vote. Exact: every test image
    is compared with every training image, a bounded number at a time.

    Args:
        train_features: (N, C) features of the images that vote.
        train_labels: (N,) integers.
        test_features: (M, C) features of the images to classify.
        test_labels: (M,) integers; a label without a training image is never right.
        ks: numbers of neighbours, each in [1, N].
        temperature: > 0; lower trusts the nearest neighbours more.
        device: where to compute, a chunk at a time; None: where the test features are.
        leave_one_out: test image i is training image ``first_row`` + i, which does not vote for
            itself.
        first_row: training row of the first test image, where one is left out.

    Raises:
        ConfigError: a k is below 1 or above N, or above N - 1 where one is left out.
        ShardError: there are no test images.
        EvaluationError: a feature is infinite or NaN.
    """
    _check(train_features, test_features, ks=ks, voters=len(train_features) - leave_one_out)
    device = device or test_features.device
    labels, votes_for = train_labels.to(device).unique(return_inverse=True)  # (L,), (N,)
    chunk = max(1, _MAX_CHUNK_VALUES // max(min(len(train_features), _MAX_VOTERS), len(labels)))
    right: dict[int, list[Tensor]] = {k: [] for k in ks}
    numbers = first_row + torch.arange(len(test_features), device=device)
    for own, rows, truth in zip(
        numbers.split(chunk), test_features.split(chunk), test_labels.split(chunk), strict=True
    ):
        queries = F.normalize(rows.to(device).float(), dim=1)  # (chunk, C)
        cosine, nearest = _neighbours(queries, train_features, k=max(ks) + leave_one_out)
        if leave_one_out:
            cosine, nearest = _without(own, cosine, nearest)  # (chunk, k) each
        weights = ((cosine - cosine[:, :1]) / temperature).exp()  # the best weighs 1: no overflow
        for k, hits in right.items():
            votes = torch.zeros(len(rows), len(labels), device=device)
            votes.scatter_add_(1, votes_for[nearest[:, :k]], weights[:, :k])
            hits.append((labels[votes.argmax(dim=1)] == truth.to(device)).cpu())
    return {k: torch.cat(hits) for k, hits in right.items()}


def _neighbours(queries: Tensor, train_features: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Return cosine and row of the k nearest training images, (chunk, k) each, nearest first."""
    values = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(train_features), _MAX_VOTERS):
        block = train_features[start : start + _MAX_VOTERS].to(queries.device)
        voters = F.normalize(block.float(), dim=1)  # (block, C)
        found, where = _nearest(queries @ voters.T, k=min(k, len(voters)))
        values = torch.cat([values, found], dim=1)
        index = torch.cat([index, where + start], dim=1)  # earlier rows come first: ties stay so
        values, order = values.sort(dim=1, descending=True, stable=True)
        values, index = values[:, :k], index.gather(1, order[:, :k])
    return values, index


def _without(own: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Drop row ``own`` (chunk,) from (chunk, k + 1) neighbours, or the farthest where it is none.

    An image is its own nearest neighbour, but one of many equal images may not be among them.
    """
    keep = index != own[:, None]
    keep[:, -1] &= ~keep.all(dim=1)
    return values[keep].view(len(own), -1), index[keep].view(len(own), -1)


def _nearest(similarity: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each row and where they are; ties go to the lower index."""
    values, index = similarity.topk(k, dim=1)
    tied = (similarity >= values[:, -1:]).sum(dim=1) > k  # topk chose among equals at its edge
    if tied.any():
        whole, order = similarity[tied].sort(dim=1, descending=True, stable=True)
        values[tied], index[tied] = whole[:, :k], order[:, :k]
    index, by_index = index.sort(dim=1)
    values, by_value = values.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, by_value)


def _check(
    train_features: Tensor, test_features: Tensor, *, ks: Sequence[int], voters: int
) -> None:
    bad = [k for k in ks if not 1 <= k <= voters]
    if bad or not ks:
        raise ConfigError(
            f"kNN: k={bad or list(ks)} with {voters} images that vote; "
            f"use k between 1 and {voters}, or give more images in eval.knn_train"
        )
    if len(test_features) == 0:
        raise ShardError("kNN: 0 test images; give at least one in eval.knn_test")
    check_finite(train_features)
    check_finite(test_features)
