"""The demo: a student becomes good at pixels, offline, on generated scenes.

Scenes with exact pixel labels are drawn and packed; a small teacher is trained on the spot with an
*image-level* contrastive objective and an MLP head; SpatialAdaptor makes that head spatial, and a
smaller student is distilled pixel by pixel. No label is used before the judging.

Shapes: B images, D embedding channels.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config, SourceConfig
from pcd_ray.data.plan import EpochPlan
from pcd_ray.data.ray_pack import pack
from pcd_ray.data.ray_views import recipe_from, view_batches
from pcd_ray.data.scenes import write_scenes
from pcd_ray.data.shards import Shards, open_shards
from pcd_ray.distill.backbones import Backbone, build_backbone, map_shape
from pcd_ray.distill.weights import save_teacher
from pcd_ray.ray_cluster import connect
from pcd_ray.seeds import derive_seed
from pcd_ray.train.optim import Schedule, set_learning_rate
from pcd_ray.train.ray_launch import TrainResult, train

_TEACHER_BATCH = 128
_TEACHER_LR = 2e-3
_TEACHER_TEMPERATURE = 0.2
_HEAD_HIDDEN = 512
_HEAD_OUT = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSize:
    """How much the demo does."""

    train_scenes: int = 1600
    """Scenes that teacher and student learn from."""
    test_scenes: int = 400
    """Scenes that kNN classifies."""
    scene_px: int = 112
    """Side of a scene, in pixels."""
    teacher_epochs: int = 10
    """Passes of the teacher over the scenes."""


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
        return {**scores, "seconds": self.seconds, "path": self.run.path, "report": report}


def demo(config: Config, size: DemoSize | None = None) -> DemoResult:
    """Draw scenes, train a teacher, distil a student, judge all three, write the report.

    Args:
        config: the student's run; its data, teacher weights and evaluation sets are filled in.
        size: how much to do.
    """
    size = size or DemoSize()
    folder = RunFolder.of(config)
    config = _filled_in(config, folder)
    connect()
    seconds: dict[str, float] = {}
    started = time.monotonic()
    write_scenes(
        folder.file("scenes"),
        num_train=size.train_scenes,
        num_test=size.test_scenes,
        size_px=size.scene_px,
        seed=config.run.seed,
    )
    pack(config.data, seed=config.run.seed)
    seconds["scenes_and_pack"] = time.monotonic() - started
    started = time.monotonic()
    if not storage.exists(config.teacher.weights):
        _train_teacher(config, size.teacher_epochs)
    seconds["teacher"] = time.monotonic() - started
    started = time.monotonic()
    run = train(config)
    seconds["distil_and_judge"] = time.monotonic() - started
    result = DemoResult(run, {name: round(value, 1) for name, value in seconds.items()})
    storage.write_text(folder.file("summary.json"), json.dumps(result.summary(), indent=2))
    return result


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


def _train_teacher(config: Config, epochs: int) -> None:
    """Train backbone and MLP head to tell images apart by their pooled features (InfoNCE)."""
    torch.manual_seed(derive_seed(config.run.seed, "teacher"))
    backbone = build_backbone(config.teacher.arch, kwargs=config.teacher.kwargs)
    channels = map_shape(backbone, config.augment.image_size_px)[0]
    head = nn.Sequential(
        nn.Linear(channels, _HEAD_HIDDEN, bias=False),
        nn.BatchNorm1d(_HEAD_HIDDEN),
        nn.ReLU(),
        nn.Linear(_HEAD_HIDDEN, _HEAD_OUT),
    )
    shards = open_shards(config.data.shards)
    plan = EpochPlan(shards.plan_sources, config.run.seed)
    steps = plan.total_steps(epochs, _TEACHER_BATCH)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.05)
    schedule = Schedule(_TEACHER_LR, 0.1 * steps, steps, 0.0)
    backbone.use_channels_last()
    backbone.train()
    for step, (first, second) in enumerate(_two_views(config, shards, plan, steps)):
        set_learning_rate(optimizer, schedule.learning_rate(step))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embedded = head(backbone(torch.cat([first, second])).mean((2, 3)))
        loss = _tell_images_apart(embedded.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_teacher(
        config.teacher.weights,
        _plain(backbone),
        head.eval(),
        activation="relu",
        licence="Apache-2.0",
    )


def _two_views(
    config: Config, shards: Shards, plan: EpochPlan, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield two independent views (B, S, S, 3) of each image, through Ray Data."""
    augment = replace(config.augment, min_scale=0.2, student_blur_prob=0.1)
    for batch in view_batches(
        shards.index,
        plan,
        recipe_from(augment, "cross_view_index"),
        seed=derive_seed(config.run.seed, "teacher views"),
        rank=0,
        num_ranks=1,
        global_batch_size=_TEACHER_BATCH,
        start_step=0,
        stop_step=steps,
        data=config.data,
    ):
        yield torch.from_numpy(batch["student_view"]), torch.from_numpy(batch["teacher_view"])


def _tell_images_apart(embedded: Tensor) -> Tensor:
    """InfoNCE over a batch: (2B, D) embeddings, row i and row B + i are views of one image."""
    unit = F.normalize(embedded, dim=1)
    logits = unit @ unit.T / _TEACHER_TEMPERATURE  # (2B, 2B)
    logits.fill_diagonal_(-torch.inf)
    partners = torch.arange(len(unit)).roll(len(unit) // 2)
    return F.cross_entropy(logits, partners)


def _plain(backbone: Backbone) -> Backbone:
    backbone.to(memory_format=torch.contiguous_format)
    return backbone.eval()
