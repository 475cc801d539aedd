"""Sections ``eval.linear``, ``eval.detect`` and ``eval.segment``: what is trained to judge."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from pcd_ray.config.checks import FORBID, require


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """Linear probe on pooled features: MoCo v3's SGD (momentum 0.9, no decay, cosine to 0)."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    views: Literal["cached", "augmented"] = "cached"
    """Features of one centre crop, computed once (``cached``), or of a new random resized crop and
    flip in each epoch (``augmented``): the full protocol, one forward pass per image and epoch."""
    epochs: int = 90
    """Passes over the images."""
    global_batch_size: int = 1024
    """Images per step; at most as many as there are."""
    base_lrs: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates per 256 images, trained side by side; features of networks differ in norm and
    spread, so that no one rate (MoCo v3's is 0.1) fits all."""
    held_out_fraction: float = 0.1
    """Share of the training images on which the rate is chosen, in (0, 0.5]; the classifier that is
    reported has been trained on all of them. [ours]"""
    standardise: bool = True
    """Bring each channel to mean 0 and variance 1 over the centre crops of all training
    images, the held-out ones included. [ours]"""
    min_scale: float = 0.08
    """``augmented``: smallest share of an image's area that a crop may cover."""

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch_size"):
            require(getattr(self, name) > 0, f"eval.linear.{name}", getattr(self, name), "> 0")
        rates = self.base_lrs
        require(
            bool(rates) and min(rates) > 0 and len(set(rates)) == len(rates),
            "eval.linear.base_lrs",
            rates,
            "different numbers > 0",
        )
        require(
            0 < self.held_out_fraction <= 0.5,
            "eval.linear.held_out_fraction",
            self.held_out_fraction,
            "in (0, 0.5]",
        )
        require(0 < self.min_scale <= 1, "eval.linear.min_scale", self.min_scale, "in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectConfig:
    """Fine-tuning a detector on a student, whole; the defaults are COCO's usual schedule."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    data: str = ""
    """Folder with images/, instances_train.json and instances_val.json, or COCO 2017 as it is
    downloaded; empty: none."""
    masks: bool = True
    """Mask R-CNN (boxes and masks), or Faster R-CNN (boxes)."""
    preset: Literal["coco_1x", "coco_2x"] = "coco_1x"
    """Steps where ``steps`` is 0: 90,000 or 180,000 of 16 images, and as many images in steps of
    another ``global_batch_size``. The rate falls to a tenth after 2/3 and 8/9 of all steps."""
    steps: int = 0
    """Optimiser steps, whatever the batch; 0: the preset's."""
    fraction: float = 1.0
    """Share of the steps, and of the images of both splits, in (0, 1]; below 1 a smoke run."""
    global_batch_size: int = 16
    """Images per step, over all ``train.num_workers``, of an elastic pair the fewest."""
    lr_per_16_images: float = 0.02
    """Learning rate per 16 images of the global batch."""
    warmup_steps: int = 1000
    """Steps of linear warm-up, at most a tenth of all."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """Decay of all weights but those of norms."""
    clip_grad_norm: float = 0.0
    """Largest norm of the gradient; 0 leaves it."""
    min_short_side_px: int = 640
    """Training draws the short side of each image from here ..."""
    max_short_side_px: int = 800
    """... to here, in steps of 32 pixels; judging takes this one."""
    max_long_side_px: int = 1333
    """Longest side of an image, in pixels."""
    flip_prob: float = 0.5
    """Probability of mirroring left and right."""
    box_head: Literal["4conv1fc", "2fc"] = "4conv1fc"
    """Four convolutions with BatchNorm and a linear layer, or two linear layers without norm, which
    cost an eighth."""
    rois_per_image: int = 512
    """Regions of each image that train the box head."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: backbone and pyramid in autocast to bfloat16; heads stay in float32."""
    checkpoint_every_steps: int = 1000
    """Optimiser steps between checkpoints, which are deleted once the scores are stored."""
    log_every_steps: int = 20
    """Optimiser steps between two lines of progress."""

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, "eval.detect.fraction", self.fraction, "in (0, 1]")
        require(0 <= self.flip_prob <= 1, "eval.detect.flip_prob", self.flip_prob, "in [0, 1]")
        require(0 <= self.momentum < 1, "eval.detect.momentum", self.momentum, "in [0, 1)")
        for name in (
            "global_batch_size",
            "lr_per_16_images",
            "min_short_side_px",
            "rois_per_image",
            "checkpoint_every_steps",
            "log_every_steps",
        ):
            require(getattr(self, name) > 0, f"eval.detect.{name}", getattr(self, name), "> 0")
        for name in ("steps", "warmup_steps", "weight_decay", "clip_grad_norm"):
            require(getattr(self, name) >= 0, f"eval.detect.{name}", getattr(self, name), ">= 0")
        require(
            self.min_short_side_px <= self.max_short_side_px <= self.max_long_side_px,
            "eval.detect.max_short_side_px",
            self.max_short_side_px,
            f"in [min_short_side_px={self.min_short_side_px}, "
            f"max_long_side_px={self.max_long_side_px}]",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentConfig:
    """How a student is judged by semantic segmentation; the set is ``eval.segmentation``.

    Values that are 0 by default are the preset's: common practice of the field [ours].
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    method: Literal["probe", "fcn"] = "probe"
    """A linear classifier on the frozen map, or fine-tuning of the whole network with an FCN
    head."""
    preset: Literal["folder", "voc12", "cityscapes"] = "folder"
    """Layout of the set, and values for the options below that are 0. ``folder``: images/, masks/,
    classes.txt, train.txt, val.txt (and test.txt); ``voc12``: VOCdevkit/VOC2012 as downloaded, with
    SegmentationClassAug where it is there; ``cityscapes``: leftImg8bit/ and gtFine/, 19 classes."""
    probe_steps: int = 1000
    """``probe``: optimiser steps, 16 images each."""
    output_stride: Literal[0, 8, 16, 32] = 8
    """``fcn``: pixels per position of the map; 0: the network's own. Where timm cannot dilate the
    network so far, the map of an earlier stage is taken, and later stages are not used."""
    head_channels: int = 0
    """``fcn``: width of the head; 0: a quarter of the map's channels."""
    dropout: float = 0.1
    """``fcn``: share of the head's channels that a step leaves out."""
    steps: int = 0
    """``fcn``: optimiser steps; 0: 30,000 of ``voc12``, 90,000 of ``cityscapes``, else 100 passes
    over train."""
    global_batch_size: int = 16
    """``fcn``: crops per optimiser step, over all workers."""
    crop_px: int = 0
    """``fcn``: side of a crop; 0: 513 of ``voc12``, 769 of ``cityscapes``, else the shorter side of
    the first training image, at most 512."""
    min_scale: float = 0.5
    """``fcn``: an image is resized by a factor drawn from ``min_scale`` to ``max_scale``."""
    max_scale: float = 2.0
    """``fcn``: the largest such factor."""
    flip_prob: float = 0.5
    """``fcn``: probability of a horizontal flip."""
    lr: float = 0.01
    """``fcn``: learning rate of SGD at the start, for ``global_batch_size`` as it is: another batch
    does not scale it. Common practice for 16 images."""
    head_lr_scale: float = 1.0
    """``fcn``: factor of the head's learning rate; 10 is also common."""
    momentum: float = 0.9
    """``fcn``: momentum of SGD."""
    weight_decay: float = 5e-4
    """``fcn``: weight decay."""
    poly_power: float = 0.9
    """``fcn``: the rate is lr (1 - t / steps)^this."""
    warmup_steps: int = 0
    """``fcn``: steps of linear warm-up."""
    clip_grad_norm: float = 0.0
    """``fcn``: largest norm of the gradient; 0 leaves it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``fcn``: ``bf16`` autocasts to bfloat16."""
    sync_batchnorm: bool = True
    """``fcn``: BatchNorm statistics over all workers, on cuda."""
    window_px: int = 0
    """``fcn``: side of the windows that larger images are predicted in; 0: 769 of ``cityscapes``,
    else whole images."""
    window_stride_px: int = 0
    """``fcn``: pixels from one window to the next, whose logits are averaged where they overlap; 0:
    two thirds of ``window_px``."""
    checkpoint_every_steps: int = 500
    """``fcn``: optimiser steps between checkpoints, from which an interrupted one goes on; they are
    deleted once the scores are stored. 0: at the end alone."""
    log_every_steps: int = 20
    """``fcn``: optimiser steps between lines of progress."""

    def __post_init__(self) -> None:
        def check(option: str, ok: bool, wanted: str) -> None:
            require(ok, f"eval.segment.{option}", getattr(self, option), wanted)

        for name in ("probe_steps", "global_batch_size", "log_every_steps", "lr", "head_lr_scale"):
            check(name, getattr(self, name) > 0, "> 0")
        for name in (
            *("head_channels", "steps", "crop_px", "weight_decay", "poly_power", "warmup_steps"),
            *("clip_grad_norm", "window_px", "window_stride_px", "checkpoint_every_steps"),
        ):
            check(name, getattr(self, name) >= 0, ">= 0")
        for name in ("dropout", "momentum"):
            check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        check("flip_prob", 0 <= self.flip_prob <= 1, "in [0, 1]")
        check("min_scale", 0 < self.min_scale <= self.max_scale, f"in (0, {self.max_scale}]")
        fits = not self.window_px or self.window_stride_px <= self.window_px
        check("window_stride_px", fits, f"at most eval.segment.window_px={self.window_px}")
