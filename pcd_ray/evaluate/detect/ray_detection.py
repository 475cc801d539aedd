"""Detection through Ray: fine-tune on Train workers, look for objects in tasks, score.

PART/metrics.jsonl        losses of the fine-tuning, whose checkpoints lie in PART/work
PART/detections.json      what was found; PART/parts until it is whole
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import ray
import torch
from torch import Tensor

from pcd_ray import storage
from pcd_ray.config import Config
from pcd_ray.errors import ShardError, naming
from pcd_ray.evaluate.detect.detect_settings import detection_task, finetune_settings
from pcd_ray.evaluate.detect.detection import detect
from pcd_ray.evaluate.detect.detection_ap import Result, average_precision, evaluated, results_of
from pcd_ray.evaluate.detect.detection_data import SPLITS, DetectionData, DetectionImage
from pcd_ray.evaluate.detect.detection_figure import (
    detection_grid,
    marked_from_results,
    marked_from_truth,
)
from pcd_ray.evaluate.detect.detection_task import DetectionTask
from pcd_ray.evaluate.finetune.finetune_log import read_history, training_curve
from pcd_ray.evaluate.finetune.ray_finetune import finetune
from pcd_ray.evaluate.judged_network import JudgedNetwork
from pcd_ray.evaluate.judging import Place
from pcd_ray.evaluate.scores import Scores
from pcd_ray.progress import counted, progress
from pcd_ray.ray_cluster import call_in_tasks
from pcd_ray.ray_shares import WorkerShare

DETECTIONS = "detections.json"
"""What was found on the validation images, as COCO's results files hold it."""

_IMAGES_PER_PART = 100
_FIGURE_IMAGES = 4


def judge_detection(
    network: JudgedNetwork,
    data: DetectionData,
    config: Config,
    *,
    place: Place,
    seed: int,
    device: str,
) -> Scores:
    """Fine-tune a detector on a network and score what it finds on the validation images.

    Args:
        network: the student; all of it is trained.
        data: the set.
        config: ``eval.detect`` says how, ``train`` with how many workers.
        place: detections are kept in its ``part``; an interrupted fine-tuning goes on from its
            ``work``.
        seed: of the new layers, the order of images, how they are resized and mirrored, and the
            bootstrap.
        device: ``cpu`` or ``cuda``.

    Returns:
        ``box_ap`` and, for masks, ``mask_ap``, each with its variants, in percent.

    Raises:
        PcdError: the network cannot be used, or training fails.
    """
    options = config.eval.detect
    task = detection_task(network, data, options, limits=config.data, seed=seed)
    with progress("checking annotations"):
        _check_objects(task, data)
    about: dict[str, Any] = {}
    results = stored_results(storage.join(place.part, DETECTIONS))
    if results is None:
        weights, about["seconds_finetuning"] = _trained(task, config, place, seed, device)
        started = time.monotonic()
        results = found_results(
            task,
            weights,
            place.part,
            category_ids=data.category_ids,
            share=WorkerShare(device, cpus=1, threads=1, labels=config.train.node_labels),
        )
        about["seconds_looking"] = round(time.monotonic() - started, 1)
    with progress("scoring detections"):
        scores = _scores(task, data, results, seed=seed)
    scores.about.update(about)
    if history := read_history(storage.join(place.part, "metrics.jsonl")):
        scores.pictures["training.png"] = training_curve(history)
    return scores


def _trained(
    task: DetectionTask, config: Config, place: Place, seed: int, device: str
) -> tuple[dict[str, Tensor], float]:
    """Return the weights after fine-tuning, and the seconds that it took."""
    started = time.monotonic()
    with naming("eval detect"):
        task.build()  # before workers are asked for
    trained = finetune(
        task,
        finetune_settings(config.eval.detect, device=device, seed=seed),
        place=place,
        num_workers=config.train.min_workers,
        device=device,
        config=config,
    )
    return trained.weights, round(time.monotonic() - started, 1)


def found_results(
    task: DetectionTask,
    weights: dict[str, Tensor],
    place: str,
    *,
    category_ids: Sequence[int],
    share: WorkerShare,
) -> list[Result]:
    """Return what a trained detector finds on the validation images, each part a Ray task.

    Parts that an interrupted call has stored are read; ``detections.json`` stays.

    Raises:
        PcdError: an image cannot be decoded, or a task fails.
    """
    images = task.images("val")
    count = len(images)
    parts = {
        storage.join(place, "parts", f"{start:07d}_of_{count:07d}.json"): images[
            start : start + _IMAGES_PER_PART
        ]
        for start in range(0, count, _IMAGES_PER_PART)
    }
    shared: Any = [ray.put(value) for value in (task, weights)]
    call_in_tasks(
        _look,
        [
            (*shared, mine, tuple(category_ids), share, uri)
            for uri, mine in parts.items()
            if stored_results(uri) is None
        ],
        share=share,
        what="detecting objects",
    )
    results = [result for uri in parts for result in stored_results(uri) or []]
    storage.write_text(storage.join(place, DETECTIONS), json.dumps(results))
    storage.delete_folder(storage.join(place, "parts"))
    return results


def _look(
    task: DetectionTask,
    weights: dict[str, Tensor],
    images: Sequence[DetectionImage],
    category_ids: tuple[int, ...],
    share: WorkerShare,
    uri: str,
) -> None:
    """Look for objects on some of the validation images, one by one, and store what is found."""
    torch.set_num_threads(share.threads)
    detector = task.build()
    detector.load_state_dict(weights)
    detector.to(torch.device(share.device)).eval()
    results: list[Result] = []
    with ThreadPoolExecutor(share.threads) as pool:
        decoded = counted(pool.map(task.views.judged, images), "images", "images", len(images))
        for image, pixels in zip(images, decoded, strict=True):
            (found,) = detect(detector, [pixels], [(image.height, image.width)])
            results += results_of(image, found, category_ids)
    storage.write_text(uri, json.dumps(results))


def stored_results(uri: str) -> list[Result] | None:
    """Return detections of an earlier call; None: there are none that are whole."""
    if not storage.exists(uri):
        return None
    try:
        found: list[Result] = json.loads(storage.read_text(uri))
    except (json.JSONDecodeError, storage.NotTextError):
        return None  # damaged: it is made again
    return found


def _check_objects(task: DetectionTask, data: DetectionData) -> None:
    images = task.images("val")
    if not any((~image.crowd).any() for image in images):
        raise ShardError(
            f"{data.val.file}: the {len(images)} images that take part have 0 objects; raise "
            f"eval.detect.fraction={task.fraction:g}"
        )
    for of in _scored(task).values():  # what the evaluator refuses is known before the training
        evaluated(images, [], category_ids=data.category_ids, of=of)


def _scores(
    task: DetectionTask, data: DetectionData, results: Sequence[Result], *, seed: int
) -> Scores:
    images = task.images("val")
    scores = Scores(values={}, about=_about(task))
    for name, kind in _scored(task).items():
        scored = average_precision(
            images,
            results,
            classes=data.classes,
            category_ids=data.category_ids,
            of=kind,
            seed=seed,
        )
        of = {f"{name}_{k}": v for k, v in scored.summary.items() if v is not None}
        scores.values.update(of)
        intervals = {f"{name}_{k}": v for k, v in scored.intervals.items() if f"{name}_{k}" in of}
        scores.intervals.update(intervals)
        scores.test_images.update(dict.fromkeys(intervals, len(images)))
        scores.classes[f"{name}_ap"] = scored.classes
    scores.pictures["detections.png"] = _drawn(task, images, results, data)
    return scores


def _scored(task: DetectionTask) -> dict[str, Literal["bbox", "segm"]]:
    return {"box": "bbox", "mask": "segm"} if task.views.masks else {"box": "bbox"}


def _about(task: DetectionTask) -> dict[str, Any]:
    return {
        f"{split}_objects": sum(int((~image.crowd).sum()) for image in task.images(split))
        for split in SPLITS
    }


def _drawn(
    task: DetectionTask,
    images: Sequence[DetectionImage],
    results: Sequence[Result],
    data: DetectionData,
) -> bytes:
    """Draw what was found beside the truth, on images spread over those with objects."""
    full = [image for image in images if (~image.crowd).any()]
    count = min(_FIGURE_IMAGES, len(full))
    chosen = [full[place * len(full) // count] for place in range(count)]
    label_of = {id_: label for label, id_ in enumerate(data.category_ids)}
    return detection_grid(
        [task.views.pixels_of(image) for image in chosen],
        [marked_from_truth(image) for image in chosen],
        [
            marked_from_results([r for r in results if r["image_id"] == image.id], label_of)
            for image in chosen
        ],
        data.classes,
    )
