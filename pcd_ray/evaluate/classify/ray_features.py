"""Ray Data: labelled images -> pooled features on storage, through a pool of actors.

Tasks on CPUs read, decode and crop; each actor holds the network, on a GPU where there is one.
Parts that lie on storage already are not computed again.

Shapes: B images, C channels.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
import torch

from pcd_ray.config import Config
from pcd_ray.data.ray_stream import ActorPool, Batch, Stage, stream_through_pool
from pcd_ray.data.ray_views import chunks_ahead, crop_chunks, rebatched
from pcd_ray.distill.backbones import map_shape
from pcd_ray.evaluate.classify.feature_store import (
    IMAGES_PER_PART,
    FeatureFolder,
    FeatureRequest,
    StoredPart,
    set_sha256,
)
from pcd_ray.evaluate.eval_sets import crop_size_px
from pcd_ray.evaluate.features import pooled_features
from pcd_ray.evaluate.judged_network import JudgedNetwork
from pcd_ray.progress import Progress, progress
from pcd_ray.ray_placement import share_of_pool


@dataclass(frozen=True, slots=True)
class StoredFeatures:
    """Features that are whole on storage; `feature_store.read_features` reads them."""

    uri: str
    num_images: int
    num_computed: int
    """Images whose features were not there yet."""
    seconds: float
    """What that took."""


def store_features(
    network: JudgedNetwork,
    index: pa.Table,
    config: Config,
    *,
    folder: str,
    device: str,
    images_per_part: int = IMAGES_PER_PART,
) -> StoredFeatures:
    """Compute the pooled features of an index's images, as far as they are not stored; Ray is up.

    Args:
        network: the frozen network.
        index: the images and their labels, N rows.
        config: sizes of crops, batches and tasks.
        folder: where the features' own folder lies; shared by all nodes.
        device: ``cpu`` or ``cuda``.
        images_per_part: images per file.

    Raises:
        ConfigError: the network cannot take crops of this size.
        ShardError: an image is gone or cannot be decoded; it is named, and finished parts are kept.
        EvaluationError: a feature is infinite or NaN.
        StorageError: the storage fails.
    """
    started = time.monotonic()
    target = FeatureFolder(
        folder,
        FeatureRequest(
            network=network.identity,
            network_sha256=network.sha256,
            set_sha256=set_sha256(index),
            num_images=index.num_rows,
            size_px=crop_size_px(config),
            images_per_part=images_per_part,
        ),
    )
    computed = 0
    if not target.is_whole():
        parts = target.kept_parts(index)
        missing = [part for part in range(target.num_parts) if part not in parts]
        parts |= _computed(target, missing, network, index, config, device)
        target.write_manifest(parts)
        computed = sum(parts[part].images for part in missing)
    seconds = round(time.monotonic() - started, 3)
    return StoredFeatures(target.uri, index.num_rows, computed, seconds)


def _computed(
    target: FeatureFolder,
    missing: list[int],
    network: JudgedNetwork,
    index: pa.Table,
    config: Config,
    device: str,
) -> dict[int, StoredPart]:
    """Compute and write the missing parts; return their records."""
    if not missing:
        return {}
    map_shape(network.backbone(), target.request.size_px, option="eval.image_size_px")
    rows = np.concatenate([np.asarray(target.rows(part), np.int64) for part in missing])
    crops = crop_chunks(index, rows, size_px=target.request.size_px, data=config.data)
    blocks = stream_through_pool(
        crops.make,
        _pool(network, config, device=device, most=crops.count),
        crops.count,
        data=config.data,
        chunks_ahead=chunks_ahead(config.data, config.eval.images_per_forward),
    )
    written = {}
    with closing(blocks), progress(f"features of {network.label}", "images", len(rows)) as shown:
        arriving = rebatched(_counted(blocks, shown), target.request.images_per_part)
        for part, batch in zip(missing, arriving, strict=True):  # all but the last are full
            features = torch.from_numpy(batch["feature"])
            written[part] = target.write_part(part, index, features)
    return written


def _counted(blocks: Iterator[Batch], shown: Progress) -> Iterator[Batch]:
    for block in blocks:
        shown.add(len(block["row"]))
        yield block


def _pool(network: JudgedNetwork, config: Config, *, device: str, most: int) -> ActorPool:
    """Return the actors that hold the network, at most ``most``."""
    size, share = share_of_pool(config, device=device, most=most)
    shared = ray.put(network)
    images_per_forward = config.eval.images_per_forward

    def build() -> Stage:
        torch.set_num_threads(share.threads)
        backbone = ray.get(shared).backbone().to(device)

        def features(block: Batch) -> Batch:
            images = torch.tensor(block["view"])  # a copy: Ray's memory is read-only
            pooled = pooled_features(backbone, images.split(images_per_forward))
            return {"feature": pooled.numpy(), "row": block["row"]}

        return features

    return ActorPool(build=build, size=size, share=share)
