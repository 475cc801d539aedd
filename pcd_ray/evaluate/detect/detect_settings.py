"""What ``eval.detect`` asks for, with presets resolved."""

from dataclasses import asdict
from typing import Any

from pcd_ray import storage
from pcd_ray.config import Config, DataConfig, DetectConfig
from pcd_ray.errors import ConfigError, naming
from pcd_ray.evaluate.contents import files_sha256
from pcd_ray.evaluate.detect.detection_data import DetectionData, open_detection
from pcd_ray.evaluate.detect.detection_examples import DetectionViews
from pcd_ray.evaluate.detect.detection_task import DetectionTask, taking_part
from pcd_ray.evaluate.eval_sets import decode_all, spread
from pcd_ray.evaluate.finetune.finetune_settings import FinetuneSettings, check_batch
from pcd_ray.evaluate.judged_network import JudgedNetwork

_PRESET_STEPS = {"coco_1x": 90_000, "coco_2x": 180_000}  # with this many images each:
_PRESET_BATCH = 16
DECODED = 1000
"""Images of a set that are decoded before a detector is trained."""


def open_detection_set(config: Config) -> DetectionData:
    """Return the set of ``eval.detect.data``; all images of a small one can be decoded.

    Of a large one an evenly spread sample is tried.

    Raises:
        ConfigError: the option is empty, or the batch does not split over the workers.
        ShardError: the set cannot be used.
    """
    detect = config.eval.detect
    if not detect.data:
        raise ConfigError(
            "eval.detect.data is empty; give a folder with images/, instances_train.json and "
            "instances_val.json, or COCO 2017 as it is downloaded"
        )
    check_batch("eval.detect.global_batch_size", detect.global_batch_size, config.train.min_workers)
    with naming("eval.detect.data"):
        data = open_detection(detect.data, masks=detect.masks)
    images = [*data.train.images, *data.val.images]
    tried = [images[row] for row in spread(len(images), DECODED)]
    pixels_of = views_of(detect, config.data).pixels_of
    decode_all("eval.detect.data", lambda image: pixels_of(image).size, tried)
    return data


def contents_of(data: DetectionData) -> list[str]:
    """Return what differs where sets do: hashes of their json files and of the list of images."""
    images = [image.uri for split in (data.train, data.val) for image in split.images]
    return [data.sha256, files_sha256(images)]


def detect_facts(data: DetectionData, config: Config, device: str) -> dict[str, Any]:
    """Return all that numbers follow from besides set, network and seed, as plain data."""
    detect = config.eval.detect
    settings = finetune_settings(detect, device=device, seed=0)
    views = asdict(views_of(detect, config.data))
    for limit in ("max_pixels", "max_decode_s"):
        del views[limit]  # decides whether an image is read, not what is seen of it
    return {
        "network": f"{'Mask' if detect.masks else 'Faster'} R-CNN with FPN",
        "classes": len(data.classes),
        "fraction": detect.fraction,
        "train_images": len(taking_part(len(data.train.images), detect.fraction, 0)),
        "val_images": len(taking_part(len(data.val.images), detect.fraction, 0)),
        **views,
        "box_head": detect.box_head,
        "rois_per_image": detect.rois_per_image,
        **settings.facts(num_workers=config.train.min_workers, device=device),
    }


def views_of(detect: DetectConfig, limits: DataConfig) -> DetectionViews:
    """Return how images are read, resized and mirrored."""
    return DetectionViews(
        min_short_side_px=detect.min_short_side_px,
        max_short_side_px=detect.max_short_side_px,
        max_long_side_px=detect.max_long_side_px,
        flip_prob=detect.flip_prob,
        max_pixels=limits.max_pixels,
        max_decode_s=limits.max_decode_s,
        masks=detect.masks,
    )


def detection_task(
    network: JudgedNetwork,
    data: DetectionData,
    options: DetectConfig,
    *,
    limits: DataConfig,
    seed: int,
) -> DetectionTask:
    """Return what the fine-tuning harness trains; here it has its set already."""
    task = DetectionTask(
        network=network,
        identity=network.identity,
        data=storage.absolute(data.uri),
        content=data.sha256,
        classes=data.classes,
        fraction=options.fraction,
        views=views_of(options, limits),
        box_head=options.box_head,
        rois_per_image=options.rois_per_image,
        seed=seed,
    )
    vars(task)["opened"] = data  # as the property would find it
    return task


def finetune_settings(options: DetectConfig, *, device: str, seed: int) -> FinetuneSettings:
    """Return the schedule: the preset's, for the batch, shortened by ``fraction``."""
    preset = _PRESET_STEPS[options.preset] * _PRESET_BATCH / options.global_batch_size
    steps = max(1, round((options.steps or preset) * options.fraction))
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
