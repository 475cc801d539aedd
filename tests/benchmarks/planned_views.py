"""The plain torch counterpart of our data path: a map-style dataset for a DataLoader.

It reads the same images in the same order and makes the same views with the same functions.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pcd_ray.data.augment import ViewRecipe, views_of_bytes
from pcd_ray.data.plan import EpochPlan
from pcd_ray.data.shards import Shards, read_image_bytes
from pcd_ray.seeds import derive_seed
from pcd_ray.train.loop import HostBatch

Item = dict[str, np.ndarray]


class PlannedViews(Dataset[Item]):
    """Views of the image at each position of the plan."""

    def __init__(
        self, shards: Shards, recipe: ViewRecipe, *, seed: int, length: int, max_pixels: int
    ) -> None:
        self.plan = EpochPlan(shards.plan_sources, seed)
        self.recipe, self.seed = recipe, seed
        self.length, self.max_pixels = length, max_pixels
        index = shards.index
        self.keys = index.column("key").to_pylist()
        self.uris = index.column("uri").to_pylist()
        self.offsets = index.column("offset").to_numpy()
        self.sizes = index.column("size").to_numpy()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Item:
        epochs, rows = self.plan.rows(position, position + 1)
        epoch, row = int(epochs[0]), int(rows[0])
        (content,) = read_image_bytes([self.uris[row]], [self.offsets[row]], [self.sizes[row]])
        seed = derive_seed(self.seed, "augment", epoch, self.keys[row])
        views = views_of_bytes(content, self.recipe, seed, max_pixels=self.max_pixels)
        item = {
            "student_view": views.student,
            "student_box": views.student_box,
            "teacher_box": views.teacher_box,
            "row": rows[0],
            "epoch": epochs[0],
        }
        if views.teacher is not None:
            item["teacher_view"] = views.teacher
        return item


def loader_batches(
    dataset: PlannedViews, *, batch_size: int, processes: int
) -> Iterator[HostBatch]:
    """Yield batches as the training loop takes them, from a DataLoader in plan order."""
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=processes,
        collate_fn=_stacked,
        persistent_workers=True,
        multiprocessing_context="spawn",  # a forked process may hang on locks of Ray's threads
        drop_last=True,
    )
    for batch in loader:
        yield {name: tensor.numpy() for name, tensor in batch.items()}


def _stacked(items: list[Item]) -> dict[str, Tensor]:
    """Stack as tensors: those travel between processes in shared memory."""
    return {name: torch.from_numpy(np.stack([i[name] for i in items])) for name in items[0]}
