"""Sections ``pairing`` and ``loss``: positives, negatives and what is made of them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from pcd_ray.config.checks import FORBID, require


@dataclass(frozen=True, kw_only=True, slots=True)
class PairingConfig:
    """Which teacher position is the positive of which student position."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    kind: Literal["same_view", "cross_view_index", "cross_view_geometric"] = "same_view"
    """One crop for both networks [ours]; two crops paired by index [code]; two crops paired by
    true image coordinates [ours]. To ``loss.kind=image`` it says no more than whether both networks
    see one crop or two; it takes the first two kinds."""
    radius: float = 0.7
    """``cross_view_geometric``: largest distance of paired cell centres, in cell diagonals."""

    def __post_init__(self) -> None:
        require(self.radius > 0, "pairing.radius", self.radius, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Pixel-wise contrastive loss, or a baseline to hold it against."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

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
        require(self.temperature > 0, "loss.temperature", self.temperature, "> 0")
        require(self.queue_size > 0, "loss.queue_size", self.queue_size, "> 0")
