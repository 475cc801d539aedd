"""Sections ``data`` and ``augment``: images, and the views made of them."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

from pcd_ray.config.checks import FORBID, require, require_labels

_PILLOWS_LIMIT_PX = 178_956_970  # it refuses larger images, twice its MAX_IMAGE_PIXELS


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One collection of images to pack."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    uri: str
    """A folder tree, a bucket prefix, or a ``.txt``/``.csv`` list (``path`` or ``path,label``)."""
    weight: float = 1.0
    """How often each image is seen per epoch, on average; 1 is exactly once."""

    def __post_init__(self) -> None:
        require(self.weight > 0, "data.sources.weight", self.weight, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Images in storage and how Ray Data works on them."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    sources: tuple[SourceConfig, ...] = ()
    """What ``pack`` reads: URIs, or ``{uri, weight}`` mappings."""
    shards: str = ""
    """Folder of packed shards: ``pack`` writes it, ``train`` reads it."""
    max_bad_fraction: float = 0.01
    """Share of unreadable images above which ``pack`` stops, in [0, 1]."""
    max_pixels: int = 100_000_000
    """Images with more pixels (width x height) are refused as unreadable; at most 178,956,970,
    beyond which Pillow reads none."""
    max_decode_s: float = 10.0
    """Images that take longer to decode, in seconds of processor time, are refused as unreadable.
    It is looked at between blocks of encoded bytes, and passed by what one block takes."""
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
    node_labels: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that read, decode and augment, e.g. ``{pool: data}``; empty: all."""

    def __post_init__(self) -> None:
        require(
            0 <= self.max_bad_fraction <= 1,
            "data.max_bad_fraction",
            self.max_bad_fraction,
            "in [0, 1]",
        )
        require(
            0 < self.max_pixels <= _PILLOWS_LIMIT_PX,
            "data.max_pixels",
            self.max_pixels,
            f"in [1, {_PILLOWS_LIMIT_PX}], the most that Pillow reads",
        )
        require(self.max_decode_s > 0, "data.max_decode_s", self.max_decode_s, "> 0")
        require(self.shard_mib > 0, "data.shard_mib", self.shard_mib, "> 0")
        require(self.images_per_task > 0, "data.images_per_task", self.images_per_task, "> 0")
        require(self.prefetch_batches >= 0, "data.prefetch_batches", self.prefetch_batches, ">= 0")
        require(self.cpus_per_task > 0, "data.cpus_per_task", self.cpus_per_task, "> 0")
        require_labels(self.node_labels, "data.node_labels")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """How an image becomes views; the probabilities and strengths are [code]'s."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

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
    """Probability of Gaussian blur, sigma 0.1 to 2 pixels, in the student's color recipe."""
    teacher_blur_prob: float = 0.1
    """The same in the teacher's color recipe."""
    student_solarize_prob: float = 0.0
    """Probability of inverting pixels of 128 and above in the student's color recipe."""
    teacher_solarize_prob: float = 0.2
    """The same in the teacher's color recipe."""
    swap_colors: bool = True
    """Whether the two color recipes (blur and solarize) change places in half of the views, chosen
    at random by image and epoch: each network then sees both, as under [code]'s symmetrized loss
    (l(s(v1), t(v2)) + l(s(v2), t(v1))) / 2, here in expectation and at half its compute per step.
    A single view of both networks follows either recipe. False: each network keeps its own. [ours]
    """
    photometric: Literal["shared", "independent"] = "shared"
    """Whether one crop seen by both networks has one set of colours (``shared``: one
    view serves both, half the work) or two; two different crops always have two. [ours]"""

    def __post_init__(self) -> None:
        require(self.image_size_px >= 8, "augment.image_size_px", self.image_size_px, ">= 8")
        require(
            0 < self.min_scale <= self.max_scale <= 1,
            "augment.min_scale",
            self.min_scale,
            f"in (0, augment.max_scale={self.max_scale}] and augment.max_scale in (0, 1]",
        )
        for name in _PROBABILITIES:
            require(
                0 <= getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "in [0, 1]"
            )
        for name in ("brightness", "contrast", "saturation"):
            require(getattr(self, name) >= 0, f"augment.{name}", getattr(self, name), ">= 0")
        require(0 <= self.hue <= 0.5, "augment.hue", self.hue, "in [0, 0.5]")


_PROBABILITIES = (
    "flip_prob",
    "jitter_prob",
    "grey_prob",
    "student_blur_prob",
    "teacher_blur_prob",
    "student_solarize_prob",
    "teacher_solarize_prob",
)
