"""Every option of a run: documented, checked where it is declared, frozen.

A configuration is a YAML file that lists what differs from the defaults below, plus overrides
``dotted.key=value`` from the command line. Origins in brackets: [code] the authors' released
code, [ours] decided here. No value here is claimed to stand in the paper.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, ClassVar, Literal, get_args

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pcd_ray.errors import ConfigError

_PILLOWS_LIMIT_PX = 178_956_970  # it refuses larger images, twice its MAX_IMAGE_PIXELS

_FORBID = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    name: str = "pcd"
    """Name of the run; its output folder is ``root/name``. The same name resumes the same run."""
    root: str = "runs"
    """Folder or bucket prefix that holds runs; shared by all nodes of a cluster."""
    seed: int = 0
    """Root of every random draw: order of images, views, initial weights, initial queue."""
    allow_changes: bool = False
    """Resume although a setting that matters differs from the stored run's."""

    def __post_init__(self) -> None:
        _require(bool(self.name) and "/" not in self.name, "run.name", self.name, "a plain name")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One collection of images to pack."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    uri: str
    """A folder tree, a bucket prefix, or a ``.txt``/``.csv`` list (``path`` or ``path,label``)."""
    weight: float = 1.0
    """How often each image is seen per epoch, on average; 1 is exactly once."""

    def __post_init__(self) -> None:
        _require(self.weight > 0, "data.sources.weight", self.weight, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Images in storage and how Ray Data works on them."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    sources: tuple[SourceConfig, ...] = ()
    """What ``pack`` reads: URIs, or ``{uri, weight}`` mappings."""
    shards: str = ""
    """Folder of packed shards: ``pack`` writes it, ``train`` reads it."""
    max_bad_fraction: float = 0.01
    """Share of unreadable images above which ``pack`` stops, in [0, 1]."""
    max_pixels: int = 100_000_000
    """Images with more pixels (width x height) are refused as unreadable; at most 178,956,970,
    beyond which Pillow reads none."""
    shard_mib: int = 128
    """Encoded bytes per shard, in MiB, before rounding to whole images."""
    images_per_task: int = 128
    """Images that one Ray Data task reads, decodes and augments; also the size of its block."""
    prefetch_batches: int = 2
    """Batches kept ready on each training worker, rounded up to whole blocks of
    ``images_per_task``; 0: none."""
    cpus_per_task: float = 0.5
    """CPUs that one Ray Data task reserves. Ray Data hands out the next task up to 0.1 s after one
    ends: with half a CPU each, another one uses the core meanwhile."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.max_bad_fraction <= 1,
            "data.max_bad_fraction",
            self.max_bad_fraction,
            "in [0, 1]",
        )
        _require(
            0 < self.max_pixels <= _PILLOWS_LIMIT_PX,
            "data.max_pixels",
            self.max_pixels,
            f"in [1, {_PILLOWS_LIMIT_PX}], the most that Pillow reads",
        )
        _require(self.shard_mib > 0, "data.shard_mib", self.shard_mib, "> 0")
        _require(self.images_per_task > 0, "data.images_per_task", self.images_per_task, "> 0")
        _require(self.prefetch_batches >= 0, "data.prefetch_batches", self.prefetch_batches, ">= 0")
        _require(self.cpus_per_task > 0, "data.cpus_per_task", self.cpus_per_task, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """How an image becomes views; the probabilities and strengths are [code]'s."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    image_size_px: int = 224
    """Side of a view, in pixels."""
    min_scale: float = 0.08
    """Smallest share of the image's area that a crop may cover."""
    max_scale: float = 1.0
    """Largest share of the image's area that a crop may cover."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip."""
    jitter_prob: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Colour jitter: brightness factor in [1 - b, 1 + b]."""
    contrast: float = 0.4
    """Colour jitter: contrast factor in [1 - c, 1 + c]."""
    saturation: float = 0.2
    """Colour jitter: saturation factor in [1 - s, 1 + s]."""
    hue: float = 0.1
    """Colour jitter: hue shift in [-h, h], as a share of the colour circle, at most 0.5."""
    grey_prob: float = 0.2
    """Probability of turning grey."""
    student_blur_prob: float = 1.0
    """Probability of Gaussian blur, sigma 0.1 to 2 pixels, on the student's view."""
    teacher_blur_prob: float = 0.1
    """The same on the teacher's view."""
    student_solarize_prob: float = 0.0
    """Probability of inverting pixels of 128 and above on the student's view."""
    teacher_solarize_prob: float = 0.2
    """The same on the teacher's view."""
    photometric: Literal["shared", "independent"] = "shared"
    """Whether one crop seen by both networks has one set of colours (``shared``: the student's
    view serves both, half the work) or two; two different crops always have two. [ours]"""

    def __post_init__(self) -> None:
        _require(self.image_size_px >= 8, "augment.image_size_px", self.image_size_px, ">= 8")
        _require(
            0 < self.min_scale <= self.max_scale <= 1,
            "augment.min_scale",
            self.min_scale,
            f"in (0, augment.max_scale={self.max_scale}] and augment.max_scale in (0, 1]",
        )
        for name in _PROBABILITIES:
            _require(
                0 <= getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "in [0, 1]"
            )
        for name in ("brightness", "contrast", "saturation"):
            _require(getattr(self, name) >= 0, f"augment.{name}", getattr(self, name), ">= 0")
        _require(0 <= self.hue <= 0.5, "augment.hue", self.hue, "in [0, 0.5]")


_PROBABILITIES = (
    "flip_prob",
    "jitter_prob",
    "grey_prob",
    "student_blur_prob",
    "teacher_blur_prob",
    "student_solarize_prob",
    "teacher_solarize_prob",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptorConfig:
    """SpatialAdaptor: how the teacher's head, made for vectors, takes maps."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    rule: Literal["gate", "tangent", "naive"] = "gate"
    """Rule for activations: ``gate`` [code] and ``tangent`` [ours] preserve the mean, ``naive``
    applies them pixel by pixel and does not (the ablation)."""
    layers: int = 0
    """Linear layers of the head that are kept, from the first; 0: all. Norm and activation behind
    each stay, but behind the last only its norm; the student's head mirrors what is kept. [ours]"""
    final_norm: bool = True
    """Keep a norm behind the last kept Linear; the released code drops MoCo v3's by accident."""
    gate_mean: Literal["image", "window"] = "image"
    """Where the mean is taken: over the whole map, which the law needs, or around each position,
    which breaks it unless the window covers the map (an ablation). [ours]"""
    gate_window: int = 3
    """Side of that window in positions, odd; it ends where the map does."""

    def __post_init__(self) -> None:
        _require(self.layers >= 0, "teacher.adaptor.layers", self.layers, ">= 0")
        _require(
            self.gate_window > 0 and self.gate_window % 2 == 1,
            "teacher.adaptor.gate_window",
            self.gate_window,
            "odd and > 0",
        )
        _require(
            self.gate_mean == "image" or self.rule != "naive",
            "teacher.adaptor.gate_mean",
            self.gate_mean,
            "image with teacher.adaptor.rule=naive, which takes no mean",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadFitConfig:
    """The head of a teacher that published none, fitted when a run begins [ours]."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    dim: int = 256
    """Width of the head."""
    images: int = 1024
    """Images that it is fitted on; fewer when there are fewer."""
    whiten: float = 0.0
    """``pca``: exponent in [0, 1] of whitening: components are divided by (standard
    deviation)^this."""
    hidden: int = 2048
    """``contrastive``: width of the hidden layer."""
    views: int = 4
    """``contrastive``: augmented views of each image whose features are kept."""
    steps: int = 1000
    """``contrastive``: optimiser steps, on cached features: minutes at most."""
    temperature: float = 0.2
    """``contrastive``: softmax temperature between views, > 0."""

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "steps"):
            _require(getattr(self, name) > 0, f"teacher.fit.{name}", getattr(self, name), "> 0")
        for name in ("images", "views"):
            _require(getattr(self, name) > 1, f"teacher.fit.{name}", getattr(self, name), "> 1")
        _require(0 <= self.whiten <= 1, "teacher.fit.whiten", self.whiten, "in [0, 1]")
        _require(self.temperature > 0, "teacher.fit.temperature", self.temperature, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The frozen network that teaches."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    arch: str = ""
    """timm model name; empty: what the weights file says, where its keys tell."""
    weights: str = ""
    """Its weights file (.safetensors, .pth) as published, any URI; empty takes timm's own
    pretrained ones of ``arch``."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``timm.create_model``, e.g. ``{pad_type: same}``."""
    mean: tuple[float, float, float] | None = None
    """Channel means of its input in [0, 1]; default: what the release or timm says."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations of its input; default as for ``mean``."""
    licence: str = ""
    """Licence of the weights, kept in checkpoints and exports; default: what the release or timm
    says, else ``unknown``."""
    head: Literal["auto", "published", "pca", "contrastive", "none"] = "auto"
    """Projection head: the one in the weights (``published``; of timm's networks: CLIP's projection
    to text, and the layers between pooling and classifier), principal components of its own pixels
    (``pca``) or an MLP that matches views of an image (``contrastive``), both fitted when the run
    begins, or bare features (``none``); ``auto`` takes ``published`` where the weights hold a
    projection, else ``pca``."""
    fit: HeadFitConfig = field(default_factory=HeadFitConfig)
    """How a ``pca`` or ``contrastive`` head is fitted."""
    projection_dim: int = 0
    """Width of a fixed random orthogonal projection behind the head, for 8192-wide ones; no layer
    of the student's mirrored head is wider then. 0: none. [ours]"""
    tokens: Literal["auto", "recentred", "patches"] = "auto"
    """Map of a network that pools itself, by a class token or attention: positions shifted so that
    their mean is its own vector (``recentred`` [ours]: the law then holds against the head of that
    vector), or bare ones (``patches``); ``auto`` recentres where a published head was trained on
    that vector. Register tokens are never part of the map."""
    adaptor: AdaptorConfig = field(default_factory=AdaptorConfig)
    """How its head takes maps."""
    weight: float = 1.0
    """Weight of its loss where two teachers' losses are added up; weights are taken as they are
    given, not divided by their sum. [ours]"""

    def __post_init__(self) -> None:
        _require(self.weight > 0, "teacher.weight", self.weight, "> 0")
        _require(self.projection_dim >= 0, "teacher.projection_dim", self.projection_dim, ">= 0")
        for name in ("mean", "std"):
            values = getattr(self, name)
            ok = values is None or all(0 <= v <= 1 for v in values)
            _require(ok, f"teacher.{name}", values, "three numbers in [0, 1]")
        _require(
            self.std is None or min(self.std) > 0, "teacher.std", self.std, "three numbers > 0"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MhsaConfig:
    """Multi-head self-attention on the student's last map; its exact shape is [ours]."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    depth: int = 1
    """Attention layers; 0 leaves the neck out."""
    heads: int = 8
    """Attention heads per layer; must divide the backbone's channels."""

    def __post_init__(self) -> None:
        _require(self.depth >= 0, "student.mhsa.depth", self.depth, ">= 0")
        _require(self.heads > 0, "student.mhsa.heads", self.heads, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """The network that learns."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    backbone: str = "resnet18"
    """Any timm model name."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``timm.create_model``."""
    output_stride: Literal[0, 8, 16, 32] = 0
    """Pixels per position of its map, each way; 0: the network's own. Where timm can widen the
    network's strides, it does; elsewhere the map of an earlier stage is taken, and the stages
    behind it are not trained. [ours]"""
    grid: Literal["pool", "interpolate", "upsample"] = "pool"
    """Where student and teacher maps differ in size: the teacher's is averaged over the student's
    cells (``pool``), or sampled at their centres (``interpolate``), or the student's is enlarged to
    the teacher's size (``upsample``). The mean of the teacher's map is kept by all. [ours]"""
    mhsa: MhsaConfig = field(default_factory=MhsaConfig)
    """The attention neck between backbone and head."""
    head_hidden: int = 0
    """Hidden width of its projection head; 0: the teacher's own widths, or a head of one layer for
    a teacher without layers to mirror."""
    head_norm: Literal["mirror", "on", "off"] = "mirror"
    """BatchNorm behind the projection head's last layer: where the teacher has one, always, or
    never."""
    predictor: bool = True
    """Mirror the teacher's predictor too, where it has one. [code]"""
    predictor_hidden: int = 0
    """Hidden width of a predictor behind the projection head; 0: the teacher's own, and none where
    it has none. [code] gives SwAV one of 2048."""
    ema: float = 0.0
    """Decay in [0, 1) of a moving average of its weights and BatchNorm statistics, which is judged
    and exported instead of it; 0: none. [ours]"""

    def __post_init__(self) -> None:
        for name in ("head_hidden", "predictor_hidden"):
            _require(getattr(self, name) >= 0, f"student.{name}", getattr(self, name), ">= 0")
        _require(
            self.predictor or not self.predictor_hidden,
            "student.predictor_hidden",
            self.predictor_hidden,
            "0 where student.predictor is false",
        )
        _require(
            not (self.output_stride and "output_stride" in self.kwargs),
            "student.output_stride",
            self.output_stride,
            "0 where student.kwargs holds output_stride",
        )
        _require(0 <= self.ema < 1, "student.ema", self.ema, "in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class PairingConfig:
    """Which teacher position is the positive of which student position."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    kind: Literal["same_view", "cross_view_index", "cross_view_geometric"] = "same_view"
    """One crop for both networks [ours]; two crops paired by index [code]; two crops paired by
    true image coordinates [ours]. To ``loss.kind=image`` it says no more than whether both networks
    see one crop or two; it takes the first two kinds."""
    radius: float = 0.7
    """``cross_view_geometric``: largest distance of paired cell centres, in cell diagonals."""

    def __post_init__(self) -> None:
        _require(self.radius > 0, "pairing.radius", self.radius, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Pixel-wise contrastive loss, or a baseline to hold it against."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    kind: Literal["pixel", "image", "mse"] = "pixel"
    """``pixel``: each student pixel against its positive and the queue, PCD [code]. ``image``: the
    same with one pair per image, the student's head's map, pooled, against the teacher's published
    vector. ``mse``: squared distance of paired unit pixels, 2 - 2 cos, without temperature, queue
    or ``implementation``. The last two are baselines. [ours]"""
    temperature: float = 0.2
    """Softmax temperature tau, > 0; lower is sharper. [code]"""
    queue_size: int = 65_536
    """Negatives K kept in the feature queue. [code]"""
    implementation: Literal["auto", "plain", "fused", "chunked"] = "auto"
    """How it is computed; ``auto`` takes ``fused`` where the width allows, else ``chunked``."""

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "loss.temperature", self.temperature, "> 0")
        _require(self.queue_size > 0, "loss.queue_size", self.queue_size, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimiser and schedule; the defaults are [code]'s."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    name: Literal["lars", "adamw"] = "lars"
    """LARS (momentum 0.9, trust coefficient 1e-3) or AdamW."""
    base_lr: float = 1.0
    """Learning rate per 256 images of the global batch."""
    weight_decay: float = 1e-5
    """Decay of weights; none on biases and norms."""
    warmup_epochs: float = 10.0
    """Linear warm-up from 0, in epochs; fractions count."""
    final_lr_fraction: float = 0.0
    """Learning rate at the end of the cosine, as a share of its peak."""
    clip_grad_norm: float = 0.0
    """Largest norm of the gradient; 0 leaves it."""

    def __post_init__(self) -> None:
        _require(self.base_lr > 0, "optim.base_lr", self.base_lr, "> 0")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, ">= 0")
        _require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, ">= 0")
        _require(
            0 <= self.final_lr_fraction <= 1,
            "optim.final_lr_fraction",
            self.final_lr_fraction,
            "in [0, 1]",
        )
        _require(self.clip_grad_norm >= 0, "optim.clip_grad_norm", self.clip_grad_norm, ">= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The training loop and its workers."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    epochs: int = 100
    """Passes over the packed images. [code]"""
    global_batch_size: int = 1024
    """Images per optimiser step, over all workers and accumulation steps. [code]"""
    accumulation_steps: int = 1
    """Forward and backward passes per optimiser step."""
    num_workers: int = 1
    """Ray Train workers; one GPU each when ``device`` is cuda."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers compute; ``auto`` takes cuda when the cluster has GPUs."""
    cpus_per_worker: float = 0.0
    """CPUs each worker reserves; 0 decides by the cluster, so that Ray Data always has room: none
    where there are up to four, else an equal part of half of them; at most one beside a GPU."""
    threads_per_worker: int = 0
    """Torch threads per worker; 0: the node's cores divided by its workers."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: autocast to bfloat16; gates, norms and the loss stay in float32."""
    channels_last: bool = False
    """Store maps with channels innermost."""
    sync_batchnorm: bool = False
    """Compute BatchNorm statistics over all workers (cuda only)."""
    compile: bool = False
    """Compile the student and the teacher with torch.compile."""
    log_every_steps: int = 10
    """Optimiser steps between two lines of metrics."""
    checkpoint_every_steps: int = 0
    """Optimiser steps between checkpoints, besides those at each epoch; 0: epochs alone."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    max_failures: int = 3
    """Times that a failed worker group is started again from the last checkpoint."""

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch_size", "accumulation_steps", "num_workers"):
            _require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "> 0")
        for name in ("log_every_steps", "keep_checkpoints"):
            _require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "> 0")
        for name in (
            "cpus_per_worker",
            "threads_per_worker",
            "checkpoint_every_steps",
            "max_failures",
        ):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), ">= 0")
        batch, parts = self.global_batch_size, self.num_workers * self.accumulation_steps
        if batch % parts:
            lower = batch - batch % parts
            fix = f"use {lower + parts}" if lower == 0 else f"use {lower} or {lower + parts}"
            raise ValueError(
                f"train.global_batch_size={batch} does not split over train.num_workers="
                f"{self.num_workers} x train.accumulation_steps={self.accumulation_steps}; {fix}"
            )

    @property
    def batch_size_per_worker(self) -> int:
        """Images that one worker takes per optimiser step."""
        return self.global_batch_size // self.num_workers


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """Linear probe on pooled features: MoCo v3's SGD (momentum 0.9, no decay, cosine to 0)."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

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
    """Bring each channel to mean 0 and variance 1 over the training images' centre crops. [ours]"""
    min_scale: float = 0.08
    """``augmented``: smallest share of an image's area that a crop may cover."""

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch_size"):
            _require(getattr(self, name) > 0, f"eval.linear.{name}", getattr(self, name), "> 0")
        rates = self.base_lrs
        _require(
            bool(rates) and min(rates) > 0 and len(set(rates)) == len(rates),
            "eval.linear.base_lrs",
            rates,
            "different numbers > 0",
        )
        _require(
            0 < self.held_out_fraction <= 0.5,
            "eval.linear.held_out_fraction",
            self.held_out_fraction,
            "in (0, 0.5]",
        )
        _require(0 < self.min_scale <= 1, "eval.linear.min_scale", self.min_scale, "in (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectConfig:
    """Fine-tuning a detector on a student, whole; the defaults are COCO's usual schedule."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    data: str = ""
    """Folder with images/, instances_train.json and instances_val.json, or COCO 2017 as it is
    downloaded; empty: none."""
    masks: bool = True
    """Mask R-CNN (boxes and masks), or Faster R-CNN (boxes)."""
    preset: Literal["coco_1x", "coco_2x"] = "coco_1x"
    """Steps where ``steps`` is 0: 90,000 or 180,000. The rate falls to a tenth after 2/3 and 8/9 of
    all steps."""
    steps: int = 0
    """Optimiser steps; 0: the preset's."""
    fraction: float = 1.0
    """Share of the steps, and of the images of both splits, in (0, 1]; below 1 a smoke run."""
    global_batch_size: int = 16
    """Images per step, over all ``train.num_workers``."""
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
    """Optimiser steps between checkpoints."""
    log_every_steps: int = 20
    """Optimiser steps between two lines of progress."""

    def __post_init__(self) -> None:
        _require(0 < self.fraction <= 1, "eval.detect.fraction", self.fraction, "in (0, 1]")
        _require(0 <= self.flip_prob <= 1, "eval.detect.flip_prob", self.flip_prob, "in [0, 1]")
        _require(0 <= self.momentum < 1, "eval.detect.momentum", self.momentum, "in [0, 1)")
        for name in (
            "global_batch_size",
            "lr_per_16_images",
            "min_short_side_px",
            "rois_per_image",
            "checkpoint_every_steps",
            "log_every_steps",
        ):
            _require(getattr(self, name) > 0, f"eval.detect.{name}", getattr(self, name), "> 0")
        for name in ("steps", "warmup_steps", "weight_decay", "clip_grad_norm"):
            _require(getattr(self, name) >= 0, f"eval.detect.{name}", getattr(self, name), ">= 0")
        _require(
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

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

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
    """``fcn``: learning rate of SGD at the start."""
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
    """``fcn``: optimiser steps between checkpoints, from which an interrupted one goes on."""
    log_every_steps: int = 20
    """``fcn``: optimiser steps between lines of progress."""

    def __post_init__(self) -> None:
        def require(option: str, ok: bool, wanted: str) -> None:
            _require(ok, f"eval.segment.{option}", getattr(self, option), wanted)

        for name in ("probe_steps", "global_batch_size", "log_every_steps", "lr", "head_lr_scale"):
            require(name, getattr(self, name) > 0, "> 0")
        for name in (
            *("head_channels", "steps", "crop_px", "weight_decay", "poly_power", "warmup_steps"),
            *("clip_grad_norm", "window_px", "window_stride_px", "checkpoint_every_steps"),
        ):
            require(name, getattr(self, name) >= 0, ">= 0")
        for name in ("dropout", "momentum"):
            require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        require("flip_prob", 0 <= self.flip_prob <= 1, "in [0, 1]")
        require("min_scale", 0 < self.min_scale <= self.max_scale, f"in (0, {self.max_scale}]")
        fits = not self.window_px or self.window_stride_px <= self.window_px
        require("window_stride_px", fits, f"at most eval.segment.window_px={self.window_px}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """How a student is judged; labels are used here alone."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    every_epochs: int = 0
    """Epochs between kNN evaluations while training; 0: at the end alone."""
    knn_train: str = ""
    """Labelled folder (class subfolders), packed shards or list file whose images vote, and which
    the linear probe trains on; empty: neither."""
    knn_test: str = ""
    """Labelled images of the same kinds that are classified."""
    knn_k: int = 20
    """Neighbours that vote while a run trains and at its end, each with weight exp(cosine / 0.07);
    one neighbour is reported too."""
    knn_ks: tuple[int, ...] = ()
    """Numbers of neighbours of ``pcd-ray eval knn``; empty: 1, 10, 20, 100 and 200, as far as there
    are images that vote."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    """The linear probe of ``pcd-ray eval linear``."""
    segmentation: str = ""
    """Labelled segmentation set, laid out as ``eval.segment.preset`` says, a folder with images/,
    masks/, train.txt, val.txt (and test.txt) by default: a linear probe on the frozen map is
    trained at the end of the run; empty: none."""
    segmentation_size_px: int = 0
    """Height to which its images are resized; 0 keeps theirs."""
    image_size_px: int = 0
    """Side of the centre crop for kNN; 0 takes ``augment.image_size_px``."""
    images_per_forward: int = 64
    """Images per forward pass of an evaluation."""
    detect: DetectConfig = field(default_factory=DetectConfig)
    """Detection and instance segmentation."""
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    """Semantic segmentation."""
    seeds: int = 1
    """Seeds with which ``pcd-ray eval`` repeats what it trains to judge; kNN draws nothing."""
    out: str = ""
    """Folder of ``pcd-ray eval``; empty: ``eval`` in the first run judged, else in ``run.root``."""
    pixel: tuple[float, float] = (0.5, 0.5)
    """The place that pictures ask about (what resembles it, attends to it): shares of an image's
    width and height in [0, 1], from the left and the top."""

    def __post_init__(self) -> None:
        _require(
            all(0 <= share <= 1 for share in self.pixel),
            "eval.pixel",
            list(self.pixel),
            "two shares in [0, 1]",
        )
        _require(self.every_epochs >= 0, "eval.every_epochs", self.every_epochs, ">= 0")
        _require(self.seeds > 0, "eval.seeds", self.seeds, "> 0")
        _require(self.knn_k > 0, "eval.knn_k", self.knn_k, "> 0")
        ks = self.knn_ks
        _require(
            min(ks, default=1) > 0 and len(set(ks)) == len(ks),
            "eval.knn_ks",
            ks,
            "different numbers > 0",
        )
        _require(self.image_size_px >= 0, "eval.image_size_px", self.image_size_px, ">= 0")
        _require(
            self.segmentation_size_px >= 0,
            "eval.segmentation_size_px",
            self.segmentation_size_px,
            ">= 0",
        )
        _require(
            self.images_per_forward > 0, "eval.images_per_forward", self.images_per_forward, "> 0"
        )
        _require(
            bool(self.knn_train) == bool(self.knn_test),
            "eval.knn_test",
            self.knn_test,
            "given together with eval.knn_train",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """The student file that others load."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    path: str = ""
    """File to write; empty: ``exported/BACKBONE.safetensors`` in the run's folder."""
    keep_neck: bool = False
    """Write the MHSA neck too, to a second file beside it."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """The student's moving average, the student itself, or the first that there is (``auto``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A run."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    run: RunConfig = field(default_factory=RunConfig)
    """Where the run lives."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images and shards."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Views."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The frozen network."""
    teacher_2: TeacherConfig | None = None
    """A second frozen network, with a head of the student's, a queue and a weight of its own; the
    losses are added up. None: one teacher. [ours]"""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The network that learns."""
    pairing: PairingConfig = field(default_factory=PairingConfig)
    """Positives."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss and its negatives."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Loop and workers."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Judging."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """The student file."""

    def __post_init__(self) -> None:
        _require(
            self.loss.kind != "image" or self.pairing.kind != "cross_view_geometric",
            "pairing.kind",
            self.pairing.kind,
            "same_view (one crop) or cross_view_index (two) with loss.kind=image, which pools "
            "positions instead of pairing them",
        )

    @property
    def teachers(self) -> dict[str, TeacherConfig]:
        """The teachers that there are, by the names of their sections."""
        both = {"teacher": self.teacher, "teacher_2": self.teacher_2}
        return {name: teacher for name, teacher in both.items() if teacher is not None}


MAY_CHANGE_ON_RESUME = (
    "run",
    "data.sources",
    "data.shards",
    "data.max_bad_fraction",
    "data.max_pixels",
    "data.shard_mib",
    "data.images_per_task",
    "data.prefetch_batches",
    "data.cpus_per_task",
    "loss.implementation",
    "teacher.weights",
    "teacher_2.weights",
    "train.num_workers",
    "train.accumulation_steps",
    "train.device",
    "train.cpus_per_worker",
    "train.threads_per_worker",
    "train.log_every_steps",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.max_failures",
    "eval",
    "export",
)
"""Options that a resumed run may set anew. ``data.shards`` and teachers' ``weights`` are places:
what lies there is compared by content hash instead. ``run.seed`` matters and is compared."""


def config_from_values(values: dict[str, Any]) -> Config:
    """Return a checked Config from plain nested data.

    Raises:
        ConfigError: all problems at once, each with its dotted path and the nearest known name.
    """
    try:
        return TypeAdapter(Config).validate_python(_with_source_mappings(values))
    except ValidationError as error:
        problems = sorted({_problem(dict(item)) for item in error.errors()})
        raise ConfigError("\n".join(problems)) from error


def config_to_values(config: Any) -> dict[str, Any]:
    """Return a Config (or a section of it) as plain nested data, ready for YAML and JSON."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain


def config_from_file(path: str, overrides: Sequence[str] = ()) -> Config:
    """Return a Config from a YAML file (``""`` for none) and ``dotted.key=value`` overrides.

    Raises:
        ConfigError: the file is missing or no YAML mapping, or an option is wrong.
    """
    values: Any = {}
    if path:
        try:
            with open(path, encoding="utf-8") as file:
                values = yaml.safe_load(file) or {}
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); give a YAML file"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: is not YAML ({error}); mend the file") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: holds {type(values).__name__}; give a mapping of sections")
    for override in overrides:
        _apply(values, override)
    return config_from_values(values)


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """Return a Config with ``dotted.key=value`` overrides applied.

    Raises:
        ConfigError: an option is wrong.
    """
    values = config_to_values(config)
    for override in overrides:
        _apply(values, override)
    return config_from_values(values)


def config_from_argv(argv: Sequence[str]) -> Config:
    """Return a Config from ``[script, CONFIG.yaml, dotted.key=value, ...]``."""
    words = list(argv[1:])
    path = words.pop(0) if words and "=" not in words[0] else ""
    return config_from_file(path, words)


def option_names(kind: Any = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every option."""
    for item in dataclasses.fields(kind):
        section = _section(item.type)
        if section is not None:
            yield from option_names(section, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def changed_options(old: Config, new: Config) -> list[str]:
    """Return a line for each option that matters and differs, ``name: old -> new``."""
    lines, one_sided = [], set()
    for section in ("teacher_2",):  # not every run has it
        given = [getattr(config, section) is not None for config in (old, new)]
        if given[0] != given[1]:
            words = ["given" if each else "none" for each in given]
            lines.append(f"{section}: {words[0]} -> {words[1]}")
            one_sided.add(section)
    for name in option_names():
        if name.partition(".")[0] in one_sided:
            continue
        harmless = name.startswith(tuple(f"{key}." for key in MAY_CHANGE_ON_RESUME))
        if (harmless or name in MAY_CHANGE_ON_RESUME) and name != "run.seed":
            continue
        before, after = option_value(old, name), option_value(new, name)
        if before != after:
            lines.append(f"{name}: {before!r} -> {after!r}")
    return lines


def option_value(config: Config, name: str) -> Any:
    """Return the value of a dotted option name; None in a section that is not given."""
    value: Any = config
    for part in name.split("."):
        value = None if value is None else getattr(value, part)
    return value


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML, defaults included."""
    return str(yaml.safe_dump(config_to_values(config), sort_keys=False))


def _section(kind: Any) -> Any:
    """Return the dataclass of a section, one that may be left out included; None: an option."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return next((k for k in kinds if dataclasses.is_dataclass(k)), None)


def _require(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override!r} is no override; write dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML ({error}); quote it") from error
    *sections, last = name.split(".")
    place = values
    for section in sections:
        inner = place.setdefault(section, {})
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {section} is {inner!r}, not a section")
        place = inner
    place[last] = "" if value is None and text == "" else value


def _with_source_mappings(values: dict[str, Any]) -> dict[str, Any]:
    """Let ``data.sources`` be one URI or a list of URIs as well as of mappings."""
    data = values.get("data")
    if not isinstance(data, dict) or "sources" not in data:
        return values
    sources = data["sources"]
    listed = sources if isinstance(sources, list | tuple) else [sources]
    mapped = [{"uri": item} if isinstance(item, str) else item for item in listed]
    return {**values, "data": {**data, "sources": mapped}}


def _problem(item: dict[str, Any]) -> str:
    """Turn one pydantic error into what, the value, the fix."""
    path = ".".join(str(part) for part in item["loc"])
    value = item.get("input")
    if item["type"] == "unexpected_keyword_argument":
        return f"{path}: unknown option{_nearest_option(path)}"
    if item["type"] == "literal_error":
        allowed = str(item["ctx"]["expected"])
        return f"{path}={value!r} is not one of {allowed}{_nearest(str(value), allowed)}"
    if item["type"] == "value_error":
        story = str(item["ctx"]["error"])
        second = path.startswith("teacher_2") and story.startswith("teacher.")
        return story.replace("teacher.", "teacher_2.") if second else story
    if item["type"] in ("missing", "missing_argument"):
        return f"{path}: missing; give a value"
    if item["type"] == "dataclass_type":
        return f"{path}={value!r}: is a section; write its options as {path}.option=value"
    if item["type"] == "string_type":
        return f"{path}={value!r}: is no text; quote it: {path}=\"'{value}'\""
    return f"{path}={value!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _nearest_option(path: str) -> str:
    depth = path.count(".")
    sections = [name for name in _section_names() if name.count(".") == depth]
    near = difflib.get_close_matches(path, [*option_names(), *sections], n=1, cutoff=0.6)
    if not near:  # the right name in the wrong section is the commonest mistake
        last = path.rpartition(".")[2]
        by_last = {name.rpartition(".")[2]: name for name in option_names()}
        near = [by_last[k] for k in difflib.get_close_matches(last, by_last, n=1, cutoff=0.8)]
    return f"; did you mean {near[0]}?" if near else "; see the options in pcd_ray/config.py"


def _section_names() -> list[str]:
    return [name.rpartition(".")[0] for name in option_names()]


def _nearest(value: str, allowed: str) -> str:
    words = [word.strip().strip("'\"") for word in allowed.replace(" or ", ",").split(",")]
    near = difflib.get_close_matches(value, words, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
