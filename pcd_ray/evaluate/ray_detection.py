"""Detection through Ray: fine-tune on Train workers, look for objects in tasks, score.

FOLDER/FINGERPRINT/checkpoints/       of the fine-tuning
FOLDER/FINGERPRINT/detections.json    what was found on the validation images, as COCO's
                                      results files hold it; parts/ until all are there
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import ray
import ray.exceptions
import torch
from torch import Tensor

from pcd_ray import storage
from pcd_ray.config import Config, DetectConfig
from pcd_ray.errors import ConfigError, PcdError, ShardError, TrainingError, naming
from pcd_ray.evaluate.detection import detect
from pcd_ray.evaluate.detection_ap import Result, average_precision, results_of
from pcd_ray.evaluate.detection_data import DetectionData, DetectionImage, open_detection
from pcd_ray.evaluate.detection_examples import DetectionViews
from pcd_ray.evaluate.detection_figure import detection_grid, marked_from_results, marked_from_truth
from pcd_ray.evaluate.detection_task import DetectionTask, content_of, taking_part
from pcd_ray.evaluate.finetune import FinetuneSettings
from pcd_ray.evaluate.ray_finetune import finetune, folder_of
from pcd_ray.evaluate.scores import Scores
from pcd_ray.evaluate.students import JudgedNetwork
from pcd_ray.ray_cluster import PASSIVE_THREADS

_PRESET_STEPS = {"coco_1x": 90_000, "coco_2x": 180_000}
_IMAGES_PER_PART = 100
_LOADERS = 4  # threads that decode images for one task
_FIGURE_IMAGES = 4


def judge_detection(
    network: JudgedNetwork, config: Config, *, folder: str, seed: int, device: str
) -> Scores:
    """Fine-tune a detector on a network and score what it finds on the validation images.

    Args:
        network: the student; all of it is trained.
        config: ``eval.detect`` says how, ``train`` with how many workers.
        folder: URI for checkpoints and detections; what lies there is gone on with.
        seed: of the new layers, the order of images and how they are resized and mirrored.
        device: ``cpu`` or ``cuda``.

    Returns:
        ``box_ap`` and, for masks, ``mask_ap``, each with its variants, in percent.

    Raises:
        PcdError: the set, the network or an option cannot be used, or training fails.
    """
    options = config.eval.detect
    _check_split(options.global_batch_size, config.train.num_workers)
    data = open_detection_set(config)
    task = detection_task(network, data, options, max_pixels=config.data.max_pixels, seed=seed)
    with naming("eval detect"):
        task.build()  # before workers are asked for
    settings = finetune_settings(options, device=device, seed=seed)
    started = time.monotonic()
    weights = finetune(
        task,
        settings,
        folder=folder,
        num_workers=config.train.num_workers,
        device=device,
        config=config,
    )
    trained = time.monotonic()
    place = folder_of(task, settings, folder=folder).uri
    results = found_results(task, weights, place, category_ids=data.category_ids, device=device)
    times = {
        "seconds_finetuning": round(trained - started, 1),
        "seconds_looking": round(time.monotonic() - trained, 1),
    }
    return _scores(task, data, results, {**_about(task, settings, data), **times})


def open_detection_set(config: Config) -> DetectionData:
    """Return the set of ``eval.detect.data``.

    Raises:
        ConfigError: the option is empty.
        ShardError: the set cannot be used.
    """
    if not config.eval.detect.data:
        raise ConfigError(
            "eval.detect.data is empty; give a folder with images/, instances_train.json and "
            "instances_val.json, or COCO 2017 as it is downloaded"
        )
    with naming("eval.detect.data"):
        return open_detection(config.eval.detect.data, masks=config.eval.detect.masks)


def detection_task(
    network: JudgedNetwork,
    data: DetectionData,
    options: DetectConfig,
    *,
    max_pixels: int,
    seed: int,
) -> DetectionTask:
    """Return what the fine-tuning harness trains."""
    return DetectionTask(
        network=network,
        identity=network.identity,
        data=storage.absolute(data.uri),
        content=content_of(data),
        classes=data.classes,
        fraction=options.fraction,
        num_images=len(taking_part(len(data.train.images), options.fraction, seed)),
        views=DetectionViews(
            min_short_side_px=options.min_short_side_px,
            max_short_side_px=options.max_short_side_px,
            max_long_side_px=options.max_long_side_px,
            flip_prob=options.flip_prob,
            max_pixels=max_pixels,
            masks=options.masks,
        ),
        box_head=options.box_head,
        rois_per_image=options.rois_per_image,
        seed=seed,
    )


def finetune_settings(options: DetectConfig, *, device: str, seed: int) -> FinetuneSettings:
    """Return the schedule: the preset's, shortened by ``fraction``."""
    steps = max(1, round((options.steps or _PRESET_STEPS[options.preset]) * options.fraction))
    return FinetuneSettings(
        steps=steps,
        global_batch_size=options.global_batch_size,
        lr=options.lr_per_16_images * options.global_batch_size / 16,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        schedule="step",
        poly_power=1.0,
        milestones=(round(steps * 2 / 3), round(steps * 8 / 9)),
        warmup_steps=min(options.warmup_steps, steps // 10),
        clip_grad_norm=options.clip_grad_norm,
        seed=seed,
        precision=options.precision,
        sync_batchnorm=device == "cuda",
        checkpoint_every_steps=options.checkpoint_every_steps,
        log_every_steps=options.log_every_steps,
    )


def found_results(
    task: DetectionTask,
    weights: dict[str, Tensor],
    place: str,
    *,
    category_ids: Sequence[int],
    device: str,
) -> list[Result]:
    """Return what a trained detector finds on the validation images, each part a Ray task.

    Parts that an interrupted call has stored are read.

    Raises:
        PcdError: an image cannot be decoded, or a task fails.
    """
    whole = storage.join(place, "detections.json")
    found = _stored(whole)
    if found is not None:
        return found
    count = len(task.images("val"))
    parts = {
        storage.join(place, "parts", f"{start:07d}_of_{count:07d}.json"): range(
            start, min(start + _IMAGES_PER_PART, count)
        )
        for start in range(0, count, _IMAGES_PER_PART)
    }
    missing = {uri: rows for uri, rows in parts.items() if _stored(uri) is None}
    shared: Any = [ray.put(value) for value in (task, weights)]
    look: Any = ray.remote(
        num_cpus=1,
        num_gpus=1 if device == "cuda" else 0,
        runtime_env={"env_vars": PASSIVE_THREADS},
    )(_look)
    try:
        ray.get(
            [
                look.remote(*shared, list(rows), tuple(category_ids), device, uri)
                for uri, rows in missing.items()
            ]
        )
    except ray.exceptions.RayError as error:
        raise _explained(error) from error
    results = [result for uri in parts for result in _stored(uri) or []]
    storage.write_text(whole, json.dumps(results))
    storage.delete_folder(storage.join(place, "parts"))
    return results


def _look(
    task: DetectionTask,
    weights: dict[str, Tensor],
    rows: list[int],
    category_ids: tuple[int, ...],
    device: str,
    uri: str,
) -> None:
    """Look for objects on some of the validation images, one by one, and store what is found."""
    torch.set_num_threads(1)  # other tasks have the other cores
    detector = task.build()
    detector.load_state_dict(weights)
    detector.to(torch.device(device)).eval()
    images = [task.images("val")[row] for row in rows]
    results: list[Result] = []
    with ThreadPoolExecutor(_LOADERS) as pool:
        for image, pixels in zip(images, pool.map(task.views.judged, images), strict=True):
            (found,) = detect(detector, [pixels], [(image.height, image.width)])
            results += results_of(image, found, category_ids)
    storage.write_text(uri, json.dumps(results))


def _check_split(global_batch_size: int, num_workers: int) -> None:
    if global_batch_size % num_workers:
        raise ConfigError(
            f"eval.detect.global_batch_size={global_batch_size} does not split over "
            f"train.num_workers={num_workers}; use "
            f"{-(-global_batch_size // num_workers) * num_workers}"
        )


def _stored(uri: str) -> list[Result] | None:
    if not storage.exists(uri):
        return None
    try:
        found: list[Result] = json.loads(storage.read_text(uri))
    except (json.JSONDecodeError, storage.NotTextError):
        return None  # damaged: it is made again
    return found


def _explained(error: ray.exceptions.RayError) -> PcdError:
    cause = getattr(error, "cause", None)
    if isinstance(cause, PcdError):
        return cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return TrainingError(
        f"looking for objects failed ({lines[-1] if lines else type(error).__name__}); the same "
        "command goes on from what is stored"
    )


def _scores(
    task: DetectionTask, data: DetectionData, results: Sequence[Result], about: dict[str, Any]
) -> Scores:
    images = task.images("val")
    if not any((~image.crowd).any() for image in images):
        raise ShardError(
            f"{data.val.file}: the {len(images)} images that take part have 0 objects; raise "
            f"eval.detect.fraction={task.fraction:g}"
        )
    kinds: dict[str, Literal["bbox", "segm"]] = {"box": "bbox"}
    if task.views.masks:
        kinds["mask"] = "segm"
    values: dict[str, float] = {}
    classes: dict[str, dict[str, float | None]] = {}
    for name, kind in kinds.items():
        scored = average_precision(
            images, results, classes=data.classes, category_ids=data.category_ids, of=kind
        )
        values |= {f"{name}_{k}": v for k, v in scored.summary.items() if v is not None}
        classes[f"{name}_ap"] = scored.classes
    drawn = _drawn(task, images, results, data)
    return Scores(values=values, classes=classes, pictures={"detections.png": drawn}, about=about)


def _about(task: DetectionTask, settings: FinetuneSettings, data: DetectionData) -> dict[str, Any]:
    judged = task.images("val")
    return {
        "network": "Mask R-CNN with FPN" if task.views.masks else "Faster R-CNN with FPN",
        "classes": len(data.classes),
        "train_images": task.num_images,
        "train_objects": sum(int((~image.crowd).sum()) for image in task.images("train")),
        "test_images": len(judged),
        "test_objects": sum(int((~image.crowd).sum()) for image in judged),
        "steps": settings.steps,
        "global_batch_size": settings.global_batch_size,
        "short_side_px": [task.views.min_short_side_px, task.views.max_short_side_px],
        "notes": list(data.notes),
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
        [image.pixels(max_pixels=task.views.max_pixels) for image in chosen],
        [marked_from_truth(image) for image in chosen],
        [
            marked_from_results([r for r in results if r["image_id"] == image.id], label_of)
            for image in chosen
        ],
        data.classes,
    )
