"""kNN on any labelled folder or shards: images through Ray Data, features on the caller's device.

Shapes: N images, C backbone channels.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pcd_ray.config import Config
from pcd_ray.data.image_index import column
from pcd_ray.data.ray_views import eval_batches
from pcd_ray.errors import naming
from pcd_ray.evaluate.classify.knn import knn_top1_pct, part_of
from pcd_ray.evaluate.eval_sets import KnnImages, crop_size_px
from pcd_ray.evaluate.features import FeatureMap, pooled_features
from pcd_ray.progress import counted, progress


def knn_scores(  # noqa: PLR0913 - the network, the images, and who shares the work
    feature_map: FeatureMap,
    images: KnnImages,
    config: Config,
    *,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    name: str = "a network",
) -> dict[int, float]:
    """Return top-1 in percent for one neighbour and for ``eval.knn_k``; a collective over ranks.

    Args:
        feature_map: frozen network, uint8 (B, S, S, 3) -> (B, C, H, W).
        images: from `open_knn_images`.
        config: sizes of crops and batches.
        device: where features and neighbours are computed.
        rank: this rank; each takes a part of the images of either set.
        num_ranks: ranks that share the work.
        name: what the network is called in progress lines.
    """
    parts: list[Tensor] = []
    sets = (("eval.knn_train", images.train), ("eval.knn_test", images.test))
    for option, index in sets[: 1 if images.leave_one_out else 2]:
        start, stop = part_of(rank, num_ranks, index.num_rows)
        rows = np.arange(start, max(stop, start + 1))  # a rank without images computes one
        with naming(option):
            views = counted(
                _views(index, rows, config), f"features of {name}", "images", len(rows), size=len
            )
            features = pooled_features(feature_map, (batch.to(device) for batch in views))
        labels = torch.from_numpy(column(index, "label")).long()
        parts += [features[: stop - start].to(device), labels]
    if images.leave_one_out:
        parts *= 2
    voters = images.train.num_rows - images.leave_one_out
    ks = sorted({1, min(config.eval.knn_k, voters)})
    leave_one_out = images.leave_one_out
    with progress(f"neighbors of {name}"):
        return knn_top1_pct(
            *parts, ks=ks, leave_one_out=leave_one_out, rank=rank, num_ranks=num_ranks
        )


def _views(
    index: pa.Table, rows: "np.ndarray[tuple[int], np.dtype[np.int64]]", config: Config
) -> Iterator[Tensor]:
    """Yield center crops (B, S, S, 3) of some rows."""
    for views, _ in eval_batches(
        index,
        rows,
        size_px=crop_size_px(config),
        batch_size=config.eval.images_per_forward,
        data=config.data,
    ):
        yield torch.from_numpy(views)
