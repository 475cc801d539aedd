"""The demo: a student becomes good at pixels, offline, on generated scenes.

A small teacher is trained on the spot with an *image-level* objective and an MLP head: it learns
which object a picture shows, never where. SpatialAdaptor makes its head spatial, and a smaller
student is distilled from it pixel by pixel, on scenes of several objects and without labels.

Shapes: B images, S pixels per side.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config, SourceConfig
from pcd_ray.data.ray_pack import pack
from pcd_ray.data.scenes import CLASSES, make_picture, write_scenes
from pcd_ray.distill.backbones import build_backbone, map_shape
from pcd_ray.distill.build import autocast_dtype
from pcd_ray.distill.weights import save_teacher
from pcd_ray.driver_lock import FolderMarks, driving
from pcd_ray.errors import ConfigError
from pcd_ray.progress import counted, log, progress
from pcd_ray.ray_cluster import check_outlives_job, connect
from pcd_ray.seeds import derive_seed
from pcd_ray.train.optim import Schedule, build_optimizer, set_learning_rate
from pcd_ray.train.ray_launch import TrainResult, train

_TEACHER_BATCH = 64
_TEACHER_LR = 4e-3
_PICTURE_PX = 64
_HEAD_HIDDEN = 512
_HEAD_OUT = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSize:
    """How much the demo does."""

    train_scenes: int = 1600
    """Scenes that the student learns from."""
    test_scenes: int = 400
    """Scenes that kNN classifies."""
    probe_scenes: tuple[int, int] = (200, 100)
    """Scenes that the segmentation probe is trained on, and is scored on."""
    scene_px: int = 112
    """Side of a scene, in pixels."""
    pictures: int = 6000
    """Pictures of one object that the teacher learns from."""
    teacher_steps: int = 800
    """Optimiser steps of the teacher."""


QUICK = DemoSize(
    train_scenes=128, test_scenes=64, probe_scenes=(32, 16), pictures=512, teacher_steps=40
)
"""All parts of the demo on little data, for a first look; its scores mean little."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo shows."""

    run: TrainResult
    seconds: dict[str, float]
    """Time of each part."""

    def summary(self) -> dict[str, Any]:
        """Return scores in percent by metric and network, times, and where the report is."""
        scores: dict[str, Any] = {
            key: self.run.metrics[key] for key in ("segmentation_miou", "knn_top1", "knn_k1_top1")
        }
        report = RunFolder(self.run.path).file("report.html")
        return {
            **scores,
            "step": self.run.metrics["step"],  # by which an export knows that these are its scores
            "seconds": self.seconds,
            "path": self.run.path,
            "report": report,
        }


def demo(config: Config, size: DemoSize | None = None) -> DemoResult:
    """Draw scenes, train a teacher, distil a student, judge all three, write the report.

    Args:
        config: the student's run; its data, teacher weights and evaluation sets are filled in.
        size: how much to do.

    Raises:
        ConfigError: the folder holds a demo of another seed or size; nothing of it was touched.
        InUseError: another driver works in the folder.
    """
    size = size or DemoSize()
    folder = RunFolder.of(config)
    check_outlives_job("run.root", folder.uri)
    with driving(FolderMarks(folder.uri, "run.name")):
        _claim(folder, {"run.seed": config.run.seed, **asdict(size)})
        return _run(_filled_in(config, folder), size, folder)


def _run(config: Config, size: DemoSize, folder: RunFolder) -> DemoResult:
    connect()
    seconds: dict[str, float] = {}
    started = time.monotonic()
    log(f"generating and packing {size.train_scenes:,} scenes")
    _write_scenes(folder, config.run.seed, size)
    pack(config.data, seed=config.run.seed)
    seconds["scenes_and_pack"] = time.monotonic() - started
    started = time.monotonic()
    if not storage.exists(config.teacher.weights):
        log(f"training the teacher, {size.teacher_steps} steps")
        _train_teacher(config, size)
    seconds["teacher"] = time.monotonic() - started
    started = time.monotonic()
    run = train(config)
    seconds["distil_and_judge"] = time.monotonic() - started
    result = DemoResult(run, {name: round(value, 1) for name, value in seconds.items()})
    storage.write_text(folder.file("summary.json"), json.dumps(result.summary(), indent=2))
    return result


def _write_scenes(folder: RunFolder, seed: int, size: DemoSize) -> None:
    total = size.train_scenes + size.test_scenes + sum(size.probe_scenes)
    with progress("generating", "scenes", total) as shown:
        write_scenes(
            folder.file("scenes"),
            num_train=size.train_scenes,
            num_test=size.test_scenes,
            size_px=size.scene_px,
            seed=seed,
            num_segmentation=size.probe_scenes,
            on_scene=shown.add,
        )


def _claim(folder: RunFolder, made_from: dict[str, Any]) -> None:
    """Note what a folder's scenes and teacher are made from, or refuse to mix them with others."""
    uri = folder.file("demo.json")
    made_from = json.loads(json.dumps(made_from))  # tuples come back as lists
    found = json.loads(storage.read_text(uri)) if storage.exists(uri) else {}
    if not found and storage.exists(folder.file("scenes")):
        found = dict.fromkeys(made_from, "unknown")
    changes = [
        f"{name}: {found.get(name)} -> {value}"
        for name, value in made_from.items()
        if found and found.get(name) != value
    ]
    if changes:
        raise ConfigError(
            f"{folder.uri} holds a demo that was made otherwise ({', '.join(changes)}); choose "
            "another run.name, or delete the folder"
        )
    storage.write_text(uri, json.dumps(made_from))


def _filled_in(config: Config, folder: RunFolder) -> Config:
    scenes = folder.file("scenes")
    data = replace(
        config.data,
        sources=(SourceConfig(uri=storage.join(scenes, "train")),),
        shards=folder.file("shards"),
    )
    judging = replace(
        config.eval,
        knn_train=storage.join(scenes, "train"),
        knn_test=storage.join(scenes, "test"),
        segmentation=storage.join(scenes, "segmentation"),
    )
    teacher = replace(config.teacher, weights=folder.file("teacher.safetensors"))
    return replace(config, data=data, eval=judging, teacher=teacher)


def _train_teacher(config: Config, size: DemoSize) -> None:
    """Train backbone and MLP head to name the object of a picture from its pooled features."""
    torch.manual_seed(derive_seed(config.run.seed, "teacher"))
    backbone = build_backbone(config.teacher.arch, kwargs=config.teacher.kwargs)
    channels = map_shape(backbone, _PICTURE_PX)[0]
    head = nn.Sequential(
        nn.Linear(channels, _HEAD_HIDDEN, bias=False),
        nn.BatchNorm1d(_HEAD_HIDDEN),
        nn.ReLU(),
        nn.Linear(_HEAD_HIDDEN, _HEAD_OUT, bias=False),
        nn.BatchNorm1d(_HEAD_OUT, affine=False),  # centred embeddings, as MoCo v3's head gives
    )
    classifier = nn.Sequential(nn.ReLU(), nn.Linear(_HEAD_OUT, len(CLASSES) - 1))
    network = nn.ModuleList([backbone, head, classifier]).train()
    backbone.use_channels_last()
    dtype = autocast_dtype(config)
    optimizer = build_optimizer("adamw", network, weight_decay=0.05)
    schedule = Schedule(_TEACHER_LR, 0.1 * size.teacher_steps, size.teacher_steps, 0.0)
    batches = _batches(*_pictures(config.run.seed, size), config.run.seed, size.teacher_steps)
    with progress("teacher", "steps", size.teacher_steps) as shown:
        for step, (pictures, labels) in enumerate(batches):
            set_learning_rate(optimizer, schedule.learning_rate(step))
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                named = classifier(head(backbone(pictures).mean((2, 3))))
            loss = F.cross_entropy(named.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shown.add()
            correct_pct = 100 * (named.argmax(1) == labels).float().mean()
            shown.note = f"loss {loss:.2f}, accuracy {correct_pct:.0f}%"
    network.eval()
    save_teacher(config.teacher.weights, backbone, head, activation="relu", licence="Apache-2.0")


def _pictures(seed: int, size: DemoSize) -> tuple[Tensor, Tensor]:
    """Return (N, S, S, 3) uint8 pictures and the (N,) objects they show."""
    numbers = counted(range(size.pictures), "teacher", "pictures", size.pictures)
    made = [make_picture(derive_seed(seed, "picture", number), _PICTURE_PX) for number in numbers]
    pictures = torch.from_numpy(np.stack([picture.image for picture in made]))
    return pictures, torch.tensor([picture.label - 1 for picture in made])


def _batches(
    pictures: Tensor, labels: Tensor, seed: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (B, S, S, 3) pictures, mirrored at random, and the (B,) objects they show."""
    random = np.random.default_rng(derive_seed(seed, "teacher order"))
    for _ in range(steps):
        chosen = torch.from_numpy(random.integers(0, len(pictures), _TEACHER_BATCH))
        mirrored = [axis for axis in (1, 2) if random.random() < 0.5]
        yield pictures[chosen].flip(mirrored), labels[chosen]
