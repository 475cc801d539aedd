"""Judge a network by semantic segmentation on Ray: a linear probe, or fine-tuning as an FCN.

The probe is one task. An FCN is fine-tuned by Ray Train workers and then predicts in as many tasks,
each of which takes a part of the test images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.exceptions
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcd_ray.config import Config, SegmentConfig
from pcd_ray.errors import ConfigError, PcdError, naming
from pcd_ray.evaluate.confusion import confusion_matrix
from pcd_ray.evaluate.eval_sets import open_probe
from pcd_ray.evaluate.fcn import FcnSettings, FcnTask
from pcd_ray.evaluate.features import frozen_map
from pcd_ray.evaluate.figures import segmentation_grid
from pcd_ray.evaluate.finetune import FinetuneSettings
from pcd_ray.evaluate.ray_finetune import finetune
from pcd_ray.evaluate.scores import Scores
from pcd_ray.evaluate.segmentation import linear_probe_miou
from pcd_ray.evaluate.segmentation_data import VOID, SegmentationData
from pcd_ray.evaluate.segmentation_layouts import PROTOCOLS
from pcd_ray.evaluate.segmentation_scores import segmentation_scores
from pcd_ray.evaluate.sliding_window import predicted_mask
from pcd_ray.evaluate.students import JudgedNetwork
from pcd_ray.ray_cluster import PASSIVE_THREADS, WorkerShare, connect, share_for_workers
from pcd_ray.seeds import derive_seed

_PICTURES = 4  # predicted masks that are drawn
_LARGEST_CROP_PX = 512  # of a set without a preset
_PASSES = 100  # over train, of such a set

Masks = dict[str, NDArray[np.uint8]]


def judge_segmentation(
    network: JudgedNetwork, config: Config, *, folder: str, seed: int, device: str
) -> Scores:
    """Return mIoU, mAcc and aAcc of a network on ``eval.segmentation``; ``val`` is the headline.

    Args:
        network: what is judged.
        config: ``eval.segment`` says how, ``train`` with how many workers.
        folder: URI where fine-tuning keeps its checkpoints, from which an interrupted one goes on.
        seed: of the head, the order of images, crops, dropout, and the bootstrap.
        device: ``cpu`` or ``cuda``.

    Raises:
        PcdError: the set cannot be used, the network is not finite, or workers fail.
    """
    data = open_probe(config)
    if data is None:
        raise ConfigError(
            "eval.segmentation is empty; give the folder of a labelled segmentation set"
        )
    with naming("eval.segmentation"):
        notes = _notes(data)
    share = share_for_workers(
        connect(),
        num_workers=config.train.num_workers,
        device=device,
        cpus_per_worker=config.train.cpus_per_worker,
        threads_per_worker=config.train.threads_per_worker,
        cpus_per_data_task=config.data.cpus_per_task,
    )
    if config.eval.segment.method == "probe":
        found, about = _probed(network, data, config.eval.segment, share, seed=seed)
    else:
        found, about = _finetuned(network, data, config, share, folder=folder, seed=seed)
    scores = segmentation_scores(found.confusions, data.classes, seed=seed)
    scores.pictures["segmentation.png"] = _picture(network.label, data, found.masks)
    scores.about.update(
        {
            "method": config.eval.segment.method,
            "preset": config.eval.segment.preset,
            "images": {split: len(names) for split, names in data.splits.items()},
            **about,
            "notes": notes,
        }
    )
    return scores


@dataclass(slots=True)
class _Found:
    """What was predicted."""

    confusions: dict[str, list[Tensor]]
    """Split -> one matrix for each image, in order."""
    masks: Masks
    """Image of ``val`` -> its predicted mask, of those that are drawn."""


def _notes(data: SegmentationData) -> list[str]:
    """Read and check all masks; return a line for each thing that is worth knowing."""
    notes = []
    for split in data.splits:
        pixels = data.pixels_per_class(split)
        absent = [name for name, count in zip(data.classes, pixels, strict=True) if not count]
        if absent and split == "train":
            notes.append(f"no training pixel has class {', '.join(absent)}: it cannot be learned")
        elif absent:
            notes.append(f"no pixel of {split} has class {', '.join(absent)}")
    return notes


def _drawn(data: SegmentationData) -> list[str]:
    names = data.names("val")
    places = np.linspace(0, len(names) - 1, min(_PICTURES, len(names))).astype(int)
    return [names[place] for place in places]


def _picture(label: str, data: SegmentationData, masks: Masks) -> bytes:
    images, truth = zip(*(data.example(name) for name in _drawn(data)), strict=True)
    return segmentation_grid(
        images, truth, {label: [masks[name] for name in _drawn(data)]}, data.classes
    )


def _judged(data: SegmentationData) -> tuple[str, ...]:
    return tuple(split for split in data.splits if split != "train")


def _run_tasks(body: Any, share: WorkerShare, tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Run a function in Ray tasks, each with a worker's share, and return what they return.

    Raises:
        PcdError: a task's own.
    """
    remote = ray.remote(
        num_cpus=share.cpus,
        num_gpus=1 if share.device == "cuda" else 0,
        runtime_env={"env_vars": PASSIVE_THREADS},
    )(body)
    try:
        results: list[Any] = ray.get([remote.remote(*task) for task in tasks])
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, PcdError):
            raise cause from error
        raise
    return results


def _probed(
    network: JudgedNetwork,
    data: SegmentationData,
    segment: SegmentConfig,
    share: WorkerShare,
    *,
    seed: int,
) -> tuple[_Found, dict[str, Any]]:
    args = (network, data, segment.probe_steps, share, seed)
    (found,) = _run_tasks(_probe, share, [args])
    return found, {"steps": segment.probe_steps, "output_stride": network.output_stride}


def _probe(
    network: JudgedNetwork, data: SegmentationData, steps: int, share: WorkerShare, seed: int
) -> _Found:
    torch.set_num_threads(share.threads)
    backbone = network.backbone().to(share.device)
    result = linear_probe_miou(backbone, data, seed=seed, splits=_judged(data), num_steps=steps)
    masks = {}
    for name in _drawn(data):
        image, truth = data.example(name)
        size = (truth.shape[0], truth.shape[1])
        found = result.predict(backbone, torch.from_numpy(image.copy())[None], size_px=size)
        masks[name] = found[0].numpy()
    return _Found({split: list(each) for split, each in result.confusions.items()}, masks)


def _finetuned(
    network: JudgedNetwork,
    data: SegmentationData,
    config: Config,
    share: WorkerShare,
    *,
    folder: str,
    seed: int,
) -> tuple[_Found, dict[str, Any]]:
    segment = config.eval.segment
    task = fcn_task(network, data, segment, seed=seed)
    settings = finetune_settings(segment, task.num_images, seed=seed)
    (about,) = _run_tasks(_tried, share, [(task, share)])
    weights = finetune(
        task,
        settings,
        folder=folder,
        num_workers=config.train.num_workers,
        device=share.device,
        config=config,
    )
    window = segment.window_px or PROTOCOLS[segment.preset].window_px
    windows = {"window_px": window, "stride_px": segment.window_stride_px}
    stored = ray.put(weights)
    parts = config.train.num_workers
    found = _run_tasks(
        _predict, share, [(task, stored, windows, share, part, parts) for part in range(parts)]
    )
    about |= {"steps": settings.steps, "crop_px": task.settings.crop_px, "window_px": window}
    return _merged(found, data), about


def fcn_task(
    network: JudgedNetwork, data: SegmentationData, segment: SegmentConfig, *, seed: int
) -> FcnTask:
    """Return what ``eval.segment`` asks for, with the preset's values where its own are 0."""
    crop = segment.crop_px or PROTOCOLS[segment.preset].crop_px
    if not crop:
        image, _ = data.example(data.names("train")[0])
        crop = min(_LARGEST_CROP_PX, *image.shape[:2])
    settings = FcnSettings(
        output_stride=segment.output_stride,
        head_channels=segment.head_channels,
        dropout=segment.dropout,
        crop_px=crop,
        min_scale=segment.min_scale,
        max_scale=segment.max_scale,
        flip_prob=segment.flip_prob,
        head_lr_scale=segment.head_lr_scale,
        seed=derive_seed(seed, "fcn"),
    )
    return FcnTask(network=network, identity=network.identity, data=data, settings=settings)


def finetune_settings(segment: SegmentConfig, num_images: int, *, seed: int) -> FinetuneSettings:
    """Return how an FCN is fine-tuned on so many images."""
    steps = segment.steps or PROTOCOLS[segment.preset].steps
    return FinetuneSettings(
        steps=steps or -(-_PASSES * num_images // segment.global_batch_size),
        global_batch_size=segment.global_batch_size,
        lr=segment.lr,
        momentum=segment.momentum,
        weight_decay=segment.weight_decay,
        schedule="poly",
        poly_power=segment.poly_power,
        milestones=(),
        warmup_steps=segment.warmup_steps,
        clip_grad_norm=segment.clip_grad_norm,
        seed=seed,
        precision=segment.precision,
        sync_batchnorm=segment.sync_batchnorm,
        checkpoint_every_steps=segment.checkpoint_every_steps,
        log_every_steps=segment.log_every_steps,
    )


def _tried(task: FcnTask, share: WorkerShare) -> dict[str, Any]:
    """Build the network and look at a map of it before it is trained; say what it is."""
    torch.set_num_threads(share.threads)
    backbone = task.build().backbone.eval()
    crop, _ = task.example(0, seed=0)
    features = frozen_map(backbone, torch.from_numpy(crop)[None])
    side = crop.shape[0] / features.shape[3]
    about: dict[str, Any] = {"output_stride": round(side)}
    if backbone.tap is not None:
        about["map"] = f"of stage {backbone.tap + 1}: timm cannot dilate {backbone.name} so far"
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
        for name in data.names(split)[part::parts]:
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
