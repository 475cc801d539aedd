"""Judge a network by semantic segmentation on Ray: a linear probe, or fine-tuning as an FCN.

The probe is one task. An FCN is fine-tuned by Ray Train workers and then predicts in as many tasks,
each of which takes a part of the test images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcd_ray.config import Config
from pcd_ray.distill.backbones import Backbone, map_shape
from pcd_ray.evaluate.features import frozen_map
from pcd_ray.evaluate.figures import segmentation_grid
from pcd_ray.evaluate.finetune.finetune_log import training_curve
from pcd_ray.evaluate.finetune.ray_finetune import finetune
from pcd_ray.evaluate.judged_network import JudgedNetwork
from pcd_ray.evaluate.judging import Place
from pcd_ray.evaluate.scores import Scores
from pcd_ray.evaluate.segment.confusion import confusion_matrix
from pcd_ray.evaluate.segment.fcn import FcnTask
from pcd_ray.evaluate.segment.segment_set import SegmentSet
from pcd_ray.evaluate.segment.segment_settings import fcn_task, finetune_settings, windows_of
from pcd_ray.evaluate.segment.segmentation import linear_probe_miou
from pcd_ray.evaluate.segment.segmentation_data import VOID, SegmentationData
from pcd_ray.evaluate.segment.segmentation_scores import segmentation_scores
from pcd_ray.evaluate.segment.sliding_window import predicted_mask
from pcd_ray.progress import counted, progress
from pcd_ray.ray_cluster import call_in_task, call_in_tasks
from pcd_ray.ray_placement import share_of_workers
from pcd_ray.ray_shares import WorkerShare

_PICTURES = 4  # predicted masks that are drawn
_SIZES = 8  # of a set's images, that a network is tried with

Masks = dict[str, NDArray[np.uint8]]


def judge_segmentation(
    network: JudgedNetwork,
    data: SegmentSet,
    config: Config,
    *,
    place: Place,
    seed: int,
    device: str,
) -> Scores:
    """Return mIoU, mAcc and aAcc of a network on ``eval.segmentation``; ``val`` is the headline.

    Args:
        network: what is judged.
        data: the set, looked through.
        config: ``eval.segment`` says how; an FCN is trained by ``train.num_workers``.
        place: an interrupted fine-tuning goes on from its ``work``.
        seed: of the head, the order of images, crops, dropout, and the bootstrap.
        device: ``cpu`` or ``cuda``.

    Raises:
        PcdError: the network takes no such images or is not finite, or workers fail.
    """
    job = _Job(network, data, config, place, seed, device)
    found, about = job.probed() if config.eval.segment.method == "probe" else job.finetuned()
    with progress("scoring masks"):
        scores = segmentation_scores(found.confusions, data.data.classes, seed=seed)
        scores.pictures["segmentation.png"] = _picture(data.data, found.masks)
    scores.pictures.update(found.pictures)
    scores.about.update(about)
    return scores


@dataclass(slots=True)
class _Found:
    """What was predicted."""

    confusions: dict[str, list[Tensor]]
    """Split -> one matrix for each image, in order."""
    masks: Masks
    """Image of ``val`` -> its predicted mask, of those that are drawn."""
    pictures: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Job:
    """One measurement."""

    network: JudgedNetwork
    opened: SegmentSet
    config: Config
    place: Place
    seed: int
    device: str

    def probed(self) -> tuple[_Found, dict[str, Any]]:
        """Train a linear probe in one task, whatever the number of workers, and score it."""
        share = self._share(1)
        steps = self.config.eval.segment.probe_steps
        work = (self.network, self.opened, steps, share, self.seed)
        found, stride = call_in_task(_probe, *work, share=share, what="segmentation")
        return found, {"output_stride": stride}

    def finetuned(self) -> tuple[_Found, dict[str, Any]]:
        """Fine-tune an FCN on the workers and predict in as many tasks."""
        data, segment = self.opened.data, self.config.eval.segment
        workers = self.config.train.min_workers
        share = self._share(workers)
        task = fcn_task(self.network, data, segment, seed=self.seed)
        settings = finetune_settings(segment, task.num_images, seed=self.seed)
        windows = windows_of(segment)
        sizes = _judged_sizes(self.opened, windows)
        about = call_in_task(_tried, task, sizes, share, share=share, what="building the FCN")
        trained = finetune(
            task,
            settings,
            place=self.place,
            num_workers=workers,
            device=share.device,
            config=self.config,
        )
        stored = ray.put(trained.weights)
        found = call_in_tasks(
            _predict,
            [(task, stored, windows, share, part, workers) for part in range(workers)],
            share=share,
            what="predicting masks",
        )
        whole = _merged(found, data)
        if trained.history:
            whole.pictures["training.png"] = training_curve(trained.history)
        return whole, about

    def _share(self, num_workers: int) -> WorkerShare:
        return share_of_workers(self.config, num_workers=num_workers, device=self.device)


def _drawn(data: SegmentationData) -> list[str]:
    names = data.names("val")
    places = np.linspace(0, len(names) - 1, min(_PICTURES, len(names))).astype(int)
    return [names[place] for place in places]


def _picture(data: SegmentationData, masks: Masks) -> bytes:
    """Draw predictions under no network's name: rows of any name may show them."""
    images, truth = zip(*(data.example(name) for name in _drawn(data)), strict=True)
    predicted = {"predicted": [masks[name] for name in _drawn(data)]}
    return segmentation_grid(images, truth, predicted, data.classes)


def _judged(data: SegmentationData) -> tuple[str, ...]:
    return tuple(split for split in data.splits if split != "train")


def _judged_sizes(opened: SegmentSet, windows: Mapping[str, int]) -> list[tuple[int, int]]:
    """Return a few sizes, small to large, of what a network is shown when it predicts."""
    window = windows["window_px"]
    sizes = opened.sizes
    if window:
        sizes = tuple(sorted({(min(h, window), min(w, window)) for h, w in sizes}))
    places = np.linspace(0, len(sizes) - 1, min(_SIZES, len(sizes))).astype(int)
    return [sizes[place] for place in places]


def _check_sizes(backbone: Backbone, sizes: Sequence[tuple[int, int]]) -> None:
    """Refuse a network that takes no images of these sizes, in its own words."""
    for height, width in sizes:
        map_shape(backbone, height, width, option="eval.segmentation_size_px")


def _probe(
    network: JudgedNetwork, opened: SegmentSet, steps: int, share: WorkerShare, seed: int
) -> tuple[_Found, int]:
    """Train and score a probe; return pixels per position of its map, too."""
    torch.set_num_threads(share.threads)
    data = opened.data
    backbone = network.backbone().to(share.device)
    sizes = _judged_sizes(opened, {"window_px": 0})
    _check_sizes(backbone, sizes)
    height, width = sizes[-1]
    stride = round(width / map_shape(backbone, height, width)[2])
    result = linear_probe_miou(backbone, data, seed=seed, splits=_judged(data), num_steps=steps)
    masks = {}
    for name in _drawn(data):
        image, truth = data.example(name)
        size = (truth.shape[0], truth.shape[1])
        found = result.predict(backbone, torch.from_numpy(image.copy())[None], size_px=size)
        masks[name] = found[0].numpy()
    confusions = {split: list(each) for split, each in result.confusions.items()}
    return _Found(confusions, masks), stride


def _tried(task: FcnTask, sizes: Sequence[tuple[int, int]], share: WorkerShare) -> dict[str, Any]:
    """Build the network and look at a map of it before it is trained; say what it is."""
    torch.set_num_threads(share.threads)
    backbone = task.build().backbone.eval()
    _check_sizes(backbone, sizes)
    crop, _ = task.example(0, seed=0)
    features = frozen_map(backbone, torch.from_numpy(crop)[None])
    about: dict[str, Any] = {"output_stride": round(crop.shape[0] / features.shape[3])}
    if backbone.tap is not None:
        stage = f"of stage {backbone.tap + 1}: timm cannot dilate {backbone.name} so far"
        about |= {"map": stage, "notes": [f"the map is {stage}"]}
    return about


def _predict(
    task: FcnTask,
    weights: Mapping[str, Tensor],
    windows: dict[str, int],
    share: WorkerShare,
    part: int,
    parts: int,
) -> _Found:
    """Predict every ``parts``-th image of the judged splits."""
    torch.set_num_threads(share.threads)
    model = task.build()
    model.load_state_dict(weights)
    model = model.to(share.device).eval()
    data = task.data
    drawn = set(_drawn(data))
    found = _Found({split: [] for split in _judged(data)}, {})
    for split in _judged(data):
        mine = data.names(split)[part::parts]
        for name in counted(mine, split, "images", len(mine)):
            image, truth = data.example(name)
            pixels = torch.from_numpy(image.copy()).to(share.device)
            size = (truth.shape[0], truth.shape[1])
            mask = predicted_mask(model.logits, pixels, size_px=size, **windows)
            labels = torch.from_numpy(truth.copy())
            found.confusions[split].append(
                confusion_matrix(labels, mask, num_classes=len(data.classes), void=VOID)
            )
            if split == "val" and name in drawn:
                found.masks[name] = mask.numpy()
    return found


def _merged(parts: Sequence[_Found], data: SegmentationData) -> _Found:
    """Put the parts' images in order again."""
    merged = _Found({}, {})
    for part in parts:
        merged.masks.update(part.masks)
    for split in _judged(data):
        merged.confusions[split] = [
            parts[place % len(parts)].confusions[split][place // len(parts)]
            for place in range(len(data.names(split)))
        ]
    return merged
