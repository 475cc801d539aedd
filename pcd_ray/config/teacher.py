"""Sections ``teacher`` and ``teacher_2``: the frozen networks."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from pcd_ray.config.checks import FORBID, require


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptorConfig:
    """SpatialAdaptor: how the teacher's head, made for vectors, takes maps."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

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
        require(self.layers >= 0, "teacher.adaptor.layers", self.layers, ">= 0")
        require(
            self.gate_window > 0 and self.gate_window % 2 == 1,
            "teacher.adaptor.gate_window",
            self.gate_window,
            "odd and > 0",
        )
        require(
            self.gate_mean == "image" or self.rule != "naive",
            "teacher.adaptor.gate_mean",
            self.gate_mean,
            "image with teacher.adaptor.rule=naive, which takes no mean",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadFitConfig:
    """The head of a teacher that published none, fitted when a run begins [ours]."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

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
            require(getattr(self, name) > 0, f"teacher.fit.{name}", getattr(self, name), "> 0")
        for name in ("images", "views"):
            require(getattr(self, name) > 1, f"teacher.fit.{name}", getattr(self, name), "> 1")
        require(0 <= self.whiten <= 1, "teacher.fit.whiten", self.whiten, "in [0, 1]")
        require(self.temperature > 0, "teacher.fit.temperature", self.temperature, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherCacheConfig:
    """The teacher's maps of a fixed set of views: computed once, stored, read by runs [ours]."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    views: int = 0
    """Views of each image whose maps are stored, in float16; epoch e trains on view e mod
    ``views``, so that fewer than ``train.epochs`` come again. 0: no cache, the teacher runs in
    every step."""
    path: str = ""
    """Folder that caches lie in, each named by all that its maps follow from, so that runs with
    the same teacher, images and views share one; any URI. Empty: ``teacher_cache`` in
    ``run.root``."""

    def __post_init__(self) -> None:
        require(self.views >= 0, "teacher.cache.views", self.views, ">= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The frozen network that teaches."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

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
    cache: TeacherCacheConfig = field(default_factory=TeacherCacheConfig)
    """Whether its maps are computed once for all epochs and runs."""
    weight: float = 1.0
    """Weight of its loss where two teachers' losses are added up; weights are taken as they are
    given, not divided by their sum. [ours]"""

    def __post_init__(self) -> None:
        require(self.weight > 0, "teacher.weight", self.weight, "> 0")
        require(self.projection_dim >= 0, "teacher.projection_dim", self.projection_dim, ">= 0")
        for name in ("mean", "std"):
            values = getattr(self, name)
            ok = values is None or all(0 <= v <= 1 for v in values)
            require(ok, f"teacher.{name}", values, "three numbers in [0, 1]")
        require(self.std is None or min(self.std) > 0, "teacher.std", self.std, "three numbers > 0")
