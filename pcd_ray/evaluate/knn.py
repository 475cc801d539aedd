"""k-nearest-neighbour classification on frozen features (cosine, weighted votes).

Shapes: N training images, M test images, C channels, L labels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pcd_ray.errors import ConfigError, ShardError
from pcd_ray.evaluate.features import check_finite

_MAX_CHUNK_VALUES = 2**24  # 64 MiB of float32 similarities at a time


def knn_top1_pct(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, float]:
    """Return the top-1 accuracy in percent for each number of neighbours in ``ks``.

    A neighbour's vote weighs exp(cosine / temperature). Ties are settled by rule: the earlier
    training row is the nearer neighbour, the smaller label wins the vote.

    Args:
        train_features: (N, C) features of the images that vote.
        train_labels: (N,) integers.
        test_features: (M, C) features of the images to classify.
        test_labels: (M,) integers; a label without a training image is never right.
        ks: numbers of neighbours, each in [1, N].
        temperature: > 0; lower trusts the nearest neighbours more.

    Raises:
        ConfigError: a k is below 1 or above N.
        ShardError: there are no test images.
        TrainingError: a feature is infinite or NaN.
    """
    _check(train_features, test_features, ks=ks)
    voters = F.normalize(train_features.float(), dim=1)  # (N, C)
    queries = F.normalize(test_features.float(), dim=1)  # (M, C)
    labels, votes_for = train_labels.unique(return_inverse=True)  # (L,), (N,)
    chunk = max(1, _MAX_CHUNK_VALUES // max(len(voters), len(labels)))
    right = dict.fromkeys(ks, 0)
    for rows, truth in zip(queries.split(chunk), test_labels.split(chunk), strict=True):
        cosine, nearest = _nearest(rows @ voters.T, k=max(ks))  # (chunk, k) each
        weights = ((cosine - cosine[:, :1]) / temperature).exp()  # the best weighs 1: no overflow
        for k in right:
            votes = torch.zeros(len(rows), len(labels), device=rows.device)
            votes.scatter_add_(1, votes_for[nearest[:, :k]], weights[:, :k])
            right[k] += int((labels[votes.argmax(dim=1)] == truth).sum())
    return {k: 100 * hits / len(queries) for k, hits in right.items()}


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


def _check(train_features: Tensor, test_features: Tensor, *, ks: Sequence[int]) -> None:
    bad = [k for k in ks if not 1 <= k <= len(train_features)]
    if bad or not ks:
        raise ConfigError(
            f"kNN: k={bad or list(ks)} with {len(train_features)} training images; "
            f"use k between 1 and {len(train_features)}, or give more images in eval.knn_train"
        )
    if len(test_features) == 0:
        raise ShardError("kNN: 0 test images; give at least one in eval.knn_test")
    check_finite(train_features)
    check_finite(test_features)
