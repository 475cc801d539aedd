"""The teacher: a frozen backbone whose head SpatialAdaptor has made spatial.

Shapes: B images of S x S pixels, D embedding channels, H x W positions.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from pcd_ray.distill.backbones import Backbone
from pcd_ray.distill.heads import output_width
from pcd_ray.distill.spatial_adaptor import SpatialAdaptor


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherIdentity:
    """What every checkpoint and export says of the teacher."""

    arch: str
    """timm model name."""
    source: str
    """Name of the weights: a release, a file's name, or timm's tag."""
    licence: str
    """Licence of the weights; ``unknown`` when nothing says."""
    head: str
    """Its projection head: ``published``, ``pca``, ``contrastive`` or ``none``."""
    sha256: str = ""
    """SHA-256 of all tensors as they are loaded, head included; that of the file is another."""


class FrozenTeacher(nn.Module):
    """A teacher that no call to ``train()`` can thaw.

    Its BatchNorm statistics must never move: they are part of what is taught, and SpatialAdaptor's
    law holds only while they stand still.
    """

    def __init__(
        self, backbone: Backbone, head: nn.Sequential | None, *, rule: str, gate_window: int = 0
    ) -> None:
        super().__init__()
        self.backbone = backbone
        layers = head if head is not None else nn.Sequential()
        self.adaptor = SpatialAdaptor(layers, rule=rule, gate_window=gate_window)
        self.requires_grad_(False)
        self.train(False)

    def width(self, channels: int) -> int:
        """Return D, given the backbone's channels."""
        return output_width(self.adaptor.head, channels)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        del mode  # a teacher never trains
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map (B, S, S, 3) uint8 images to the adapted map (B, D, H, W), not normalised."""
        result: Tensor = self.adaptor(self.backbone(images))
        return result
