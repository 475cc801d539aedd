"""Judge a finished run from storage: kNN, segmentation probe and figures, as one Ray task.

The untrained student, the distilled student and the teachers are judged alike, on the features of
their frozen backbones.
"""

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import ray
import torch

from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder, find_checkpoint
from pcd_ray.config import Config
from pcd_ray.data.plan import EpochPlan, RankPlan
from pcd_ray.data.ray_views import eval_batches, view_batches
from pcd_ray.data.recipe import recipe_from
from pcd_ray.data.shards import open_shards
from pcd_ray.distill.backbones import Backbone, map_shape
from pcd_ray.distill.build import build_student
from pcd_ray.distill.build_teacher import load_teachers
from pcd_ray.distill.student import Student
from pcd_ray.errors import ConfigError, PcdError, naming
from pcd_ray.evaluate.classify.classify_settings import contents_of
from pcd_ray.evaluate.classify.ray_knn import knn_scores
from pcd_ray.evaluate.eval_sets import open_knn_images, open_probe
from pcd_ray.evaluate.features import frozen_map
from pcd_ray.evaluate.figures import pca_maps, segmentation_grid, views_grid
from pcd_ray.evaluate.necks import stored_student
from pcd_ray.evaluate.pixels.pixel_pictures import draw_pixel_pictures
from pcd_ray.evaluate.segment.segmentation import ProbeResult, linear_probe_miou
from pcd_ray.evaluate.segment.segmentation_data import SegmentationData
from pcd_ray.evaluate.shared_scores import shared_knn, shared_probe
from pcd_ray.progress import counted, progress
from pcd_ray.ray_cluster import call_in_task
from pcd_ray.ray_placement import wait_for_workers
from pcd_ray.ray_shares import WorkerShare

_FIGURE_IMAGES = 6
_FIGURE_SCENES = 4
_FIGURE_ZOOM = 3  # side of those images, in sides of training views


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a run is worth; everything in percent."""

    step: int
    """Step of the checkpoint that was judged."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Metric -> network -> value, e.g. ``knn_top1`` and ``segmentation_miou``."""
    segmentation_classes: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Class -> network -> IoU on the validation split; None: it occurs nowhere."""
    failures: dict[str, str] = field(default_factory=dict)
    """What could not be judged or drawn -> why."""


def judge(config: Config, *, share: WorkerShare, say: Callable[[str], None]) -> Judgement:
    """Judge the newest checkpoint of a run in a Ray task; write its figures to the run's folder.

    A score that cannot be had costs itself alone.

    Args:
        config: the run.
        share: what the task gets: a training worker's, the rest is left to Ray Data.
        say: is given lines while nodes are waited for: those of training may be gone.

    Raises:
        CheckpointError: the run has no whole checkpoint.
    """
    step = int(find_checkpoint(RunFolder.of(config).uri, with_state=False).about["step"])
    try:
        wait_for_workers(config, share, say=say, num_workers=1)
        what = "evaluating the student"
        result: Judgement = call_in_task(_judge, config, share, share=share, what=what)
    except (ray.exceptions.RayError, PcdError) as error:
        return Judgement(
            step, failures={"any score": _story(getattr(error, "cause", None) or error)}
        )
    return result


def _judge(config: Config, share: WorkerShare) -> Judgement:
    torch.set_num_threads(share.threads)
    place = torch.device(share.device)
    stored = find_checkpoint(RunFolder.of(config).uri)
    student = stored_student(stored).to(place)
    networks = _networks(config, student, place)
    judged = Judgement(int(stored.about["step"]))
    with _noted("kNN", judged.failures):
        judged.scores.update(_knn(config, networks, place))
    with _noted("segmentation", judged.failures):
        _judge_segmentation(config, networks, judged)
    if not config.eval.pictures:
        return judged
    with _noted("pictures", judged.failures), progress("drawing pictures"):
        _draw_views(config)
        _draw_looks(config, networks, student)
    return judged


@contextmanager
def _noted(part: str, failures: dict[str, str]) -> Iterator[None]:
    """Go on without a part that fails, of whatever cause: days of training lie before it."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        failures[part] = _story(error)


def _story(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, PcdError):  # our own errors speak for themselves
        return " ".join(lines)
    return ": ".join([type(error).__name__, *lines[-1:]])


def _judge_segmentation(config: Config, networks: dict[str, Backbone], judged: Judgement) -> None:
    picture = RunFolder.of(config).file("figures", "segmentation.png")
    storage.delete_file(picture)  # an earlier judgement's
    data = open_probe(config)
    if data is None:
        return
    with naming("eval.segmentation"):
        probes = _probes(config, data, networks)
    judged.scores.update(_segmentation_scores(probes))
    judged.segmentation_classes.update(_class_scores(probes, data))
    storage.write_bytes(picture, _drawn_predictions(data, networks, probes))


def _networks(config: Config, student: Student, device: torch.device) -> dict[str, Backbone]:
    found = {"untrained": build_student(config, []).backbone, "student": student.backbone}
    found |= {loaded.name: loaded.backbone for loaded in load_teachers(config)}
    return {name: network.to(device).eval() for name, network in found.items()}


def _knn(
    config: Config, networks: dict[str, Backbone], device: torch.device
) -> dict[str, dict[str, float]]:
    images = open_knn_images(config)
    if images is None:
        return {}
    sets = contents_of(images) if config.eval.references else []
    found = {}
    for name, network in counted(networks.items(), "kNN", "networks", len(networks)):
        measure = partial(knn_scores, network, images, config, device=device)
        found[name] = measure() if name == "student" else shared_knn(config, network, sets, measure)
    best = max(next(iter(found.values())))
    return {
        "knn_top1": {name: scores[best] for name, scores in found.items()},
        "knn_k1_top1": {name: scores[1] for name, scores in found.items()},
    }


def _probes(
    config: Config, data: SegmentationData, networks: dict[str, Backbone]
) -> dict[str, ProbeResult]:
    probes = {}
    for name, network in counted(networks.items(), "segmentation", "networks", len(networks)):
        measure = partial(
            linear_probe_miou, network, data, seed=config.run.seed, splits=_judged_splits(data)
        )
        probes[name] = (
            measure() if name == "student" else shared_probe(config, network, data, measure)
        )
    return probes


def _judged_splits(data: SegmentationData) -> tuple[str, ...]:
    return tuple(split for split in data.splits if split != "train")


def _segmentation_scores(probes: dict[str, ProbeResult]) -> dict[str, dict[str, float]]:
    scores = {"segmentation_miou": {n: p.scores["val"].miou_pct for n, p in probes.items()}}
    if all("test" in probe.scores for probe in probes.values()):
        scores["segmentation_test_miou"] = {
            name: probe.scores["test"].miou_pct for name, probe in probes.items()
        }
    return scores


def _class_scores(
    probes: dict[str, ProbeResult], data: SegmentationData
) -> dict[str, dict[str, float | None]]:
    def score(probe: ProbeResult, name: str) -> float | None:
        value = probe.scores["val"].iou_pct[name]
        return None if math.isnan(value) else value

    return {
        name: {network: score(probe, name) for network, probe in probes.items()}
        for name in data.classes
    }


def _drawn_predictions(
    data: SegmentationData,
    networks: dict[str, Backbone],
    probes: dict[str, ProbeResult],
) -> bytes:
    names = data.names("val")
    spread = np.linspace(0, len(names) - 1, min(_FIGURE_SCENES, len(names))).astype(int)
    examples = [data.example(names[place]) for place in spread]
    predictions = {
        name: [
            probes[name].predict(network, torch.from_numpy(image.copy())[None])[0].numpy()
            for image, _ in examples
        ]
        for name, network in networks.items()
    }
    images, truth = zip(*examples, strict=True)
    return segmentation_grid(images, truth, predictions, data.classes)


def _draw_views(config: Config) -> None:
    """Draw the first views of the run, as the networks see them."""
    shards = open_shards(config.data.shards)
    plan = EpochPlan(shards.plan_sources, config.run.seed)
    batches = view_batches(
        shards.index,
        RankPlan(plan=plan, global_batch_size=8, stop_step=1),
        recipe_from(config.augment, config.pairing.kind),
        seed=config.run.seed,
        data=config.data,
    )
    batch = next(iter(batches))
    png = views_grid(
        batch["student_view"], batch.get("teacher_view"), batch["student_box"], batch["teacher_box"]
    )
    storage.write_bytes(RunFolder.of(config).file("figures", "views.png"), png)


def _draw_looks(config: Config, networks: dict[str, Backbone], student: Student) -> None:
    """Draw what all networks make of the same images and of one pixel of them."""
    large = _takes_any_size(networks, _FIGURE_ZOOM * config.augment.image_size_px)
    images = torch.from_numpy(_figure_images(config, large=large))
    maps = {name: frozen_map(network, images).cpu() for name, network in networks.items()}
    figures = RunFolder.of(config).file("figures")
    storage.write_bytes(storage.join(figures, "pca_maps.png"), pca_maps(images, maps))
    pictures = draw_pixel_pictures(
        networks,
        images,
        pixel=config.eval.pixel,
        necks={"student": student} if len(student.neck) else {},
    )
    for name, png in pictures.items():
        storage.write_bytes(storage.join(figures, name), png)


def _takes_any_size(networks: dict[str, Backbone], size: int) -> bool:
    try:
        shapes = [map_shape(network, size) for network in networks.values()]
    except ConfigError:  # a network made for one size
        return False
    return bool(shapes)


def _figure_images(config: Config, *, large: bool) -> np.ndarray[Any, Any]:
    """Return a few packed images; where networks allow, ``large``: a finer map is easier read."""
    shards = open_shards(config.data.shards)
    size = config.augment.image_size_px * (_FIGURE_ZOOM if large else 1)
    rows = np.linspace(0, shards.num_images - 1, _FIGURE_IMAGES).astype(np.int64)
    batches = eval_batches(
        shards.index, rows, size_px=size, batch_size=_FIGURE_IMAGES, data=config.data
    )
    return next(iter(batches))[0]
