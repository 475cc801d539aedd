"""What ``eval.segment`` asks for, with presets and defaults resolved for a set."""

from dataclasses import asdict
from typing import Any

from pcd_ray.config import Config, SegmentConfig
from pcd_ray.evaluate.finetune.finetune_settings import FinetuneSettings
from pcd_ray.evaluate.judged_network import JudgedNetwork
from pcd_ray.evaluate.segment.fcn import FcnSettings, FcnTask
from pcd_ray.evaluate.segment.segment_set import SegmentSet
from pcd_ray.evaluate.segment.segmentation_data import SegmentationData
from pcd_ray.evaluate.segment.segmentation_layouts import PROTOCOLS
from pcd_ray.evaluate.segment.sliding_window import default_stride
from pcd_ray.seeds import derive_seed

_LARGEST_CROP_PX = 512  # of a set without a preset
_PASSES = 100  # over train, of such a set


def segment_facts(opened: SegmentSet, config: Config, device: str) -> dict[str, Any]:
    """Return all that numbers follow from besides set, network and seed, as plain data."""
    data, segment = opened.data, config.eval.segment
    facts: dict[str, Any] = {
        "method": segment.method,
        "image_height_px": data.size_px or "as stored",
        **{f"{split}_images": len(names) for split, names in data.splits.items()},
    }
    if segment.method == "probe":
        return {**facts, "steps": segment.probe_steps}
    crops = {k: v for k, v in asdict(fcn_settings(segment, data, seed=0)).items() if k != "seed"}
    settings = finetune_settings(segment, len(data.names("train")), seed=0)
    training = settings.facts(num_workers=config.train.min_workers, device=device)
    return {**facts, **crops, **windows_of(segment), **training}


def fcn_task(
    network: JudgedNetwork, data: SegmentationData, segment: SegmentConfig, *, seed: int
) -> FcnTask:
    """Return what is fine-tuned."""
    settings = fcn_settings(segment, data, seed=seed)
    return FcnTask(network=network, identity=network.identity, data=data, settings=settings)


def fcn_settings(segment: SegmentConfig, data: SegmentationData, *, seed: int) -> FcnSettings:
    """Return network and crops, with the preset's values where the options are 0."""
    crop = segment.crop_px or PROTOCOLS[segment.preset].crop_px
    if not crop:
        image, _ = data.example(data.names("train")[0])
        crop = min(_LARGEST_CROP_PX, *image.shape[:2])
    return FcnSettings(
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


def windows_of(segment: SegmentConfig) -> dict[str, int]:
    """Return side and stride of the windows that images are predicted in; 0: whole images."""
    window = segment.window_px or PROTOCOLS[segment.preset].window_px
    stride = segment.window_stride_px or (default_stride(window) if window else 0)
    return {"window_px": window, "stride_px": stride if window else 0}
