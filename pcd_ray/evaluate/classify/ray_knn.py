"""kNN on any labelled folder or shards: images through Ray Data, features on the caller's device.

Shapes: N images, C backbone channels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pcd_ray.config import Config
from pcd_ray.data.image_index import column
from pcd_ray.data.ray_views import eval_batches
from pcd_ray.errors import naming
from pcd_ray.evaluate.classify.knn import knn_top1_pct
from pcd_ray.evaluate.eval_sets import KnnImages, crop_size_px
from pcd_ray.evaluate.features import FeatureMap, pooled_features

Gather = Callable[[Tensor], Sequence[Tensor]]
"""Collects one tensor of each rank, in rank order."""


def knn_scores(  # noqa: PLR0913 - the network, the images, and who shares the work
    feature_map: FeatureMap,
    images: KnnImages,
    config: Config,
    *,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    gather: Gather = lambda part: [part],
) -> dict[int, float]:
    """Return top-1 in percent for one neighbour and for ``eval.knn_k``; a collective over ranks.

    Args:
        feature_map: frozen network, uint8 (B, S, S, 3) -> (B, C, H, W).
        images: from `open_knn_images`.
        config: sizes of crops and batches.
        device: where the features are computed.
        rank: this rank; it takes every ``num_ranks``-th image.
        num_ranks: ranks that share the work.
        gather: collects the ranks' parts.
    """
    parts: list[Tensor] = []
    sets = (("eval.knn_train", images.train), ("eval.knn_test", images.test))
    for option, index in sets[: 1 if images.leave_one_out else 2]:
        rows = np.arange(rank, index.num_rows, num_ranks)
        with naming(option):
            features = _features(feature_map, index, rows, config, device)
        labels = torch.from_numpy(column(index, "label")[rows]).long()
        parts += [torch.cat(list(gather(features))), torch.cat(list(gather(labels)))]
    if images.leave_one_out:
        parts *= 2
    voters = images.train.num_rows - images.leave_one_out
    ks = sorted({1, min(config.eval.knn_k, voters)})
    return knn_top1_pct(*parts, ks=ks, leave_one_out=images.leave_one_out)


def _features(
    feature_map: FeatureMap,
    index: pa.Table,
    rows: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    config: Config,
    device: torch.device,
) -> Tensor:
    batches = eval_batches(
        index,
        rows,
        size_px=crop_size_px(config),
        batch_size=config.eval.images_per_forward,
        data=config.data,
    )
    return pooled_features(
        feature_map, (torch.from_numpy(views).to(device) for views, _ in batches)
    ).cpu()
