"""Section ``student``: the network that learns."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from pcd_ray.config.checks import FORBID, require


@dataclass(frozen=True, kw_only=True, slots=True)
class MhsaConfig:
    """Multi-head self-attention on the student's last map; its exact shape is [ours]."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    depth: int = 1
    """Attention layers; 0 leaves the neck out."""
    heads: int = 8
    """Attention heads per layer; must divide the backbone's channels."""

    def __post_init__(self) -> None:
        require(self.depth >= 0, "student.mhsa.depth", self.depth, ">= 0")
        require(self.heads > 0, "student.mhsa.heads", self.heads, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """The network that learns."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

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
            require(getattr(self, name) >= 0, f"student.{name}", getattr(self, name), ">= 0")
        require(
            self.predictor or not self.predictor_hidden,
            "student.predictor_hidden",
            self.predictor_hidden,
            "0 where student.predictor is false",
        )
        require(
            not (self.output_stride and "output_stride" in self.kwargs),
            "student.output_stride",
            self.output_stride,
            "0 where student.kwargs holds output_stride",
        )
        require(0 <= self.ema < 1, "student.ema", self.ema, "in [0, 1)")
