"""The student: backbone -> MHSA neck -> one projection head for each teacher.

Shapes: B images of S x S pixels, C backbone channels, D embedding channels of a teacher, H x W
positions.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from pcd_ray.distill.backbones import Backbone
from pcd_ray.distill.mhsa import MhsaNeck


class Student(nn.Module):
    """The network that learns; the backbone is what is kept."""

    def __init__(self, backbone: Backbone, neck: MhsaNeck, heads: Sequence[nn.Sequential]) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.heads = nn.ModuleList(heads)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map (B, S, S, 3) uint8 images to each head's (B, D, H, W), not normalised."""
        features = self.neck(self.backbone(images))  # (B, C, H, W), computed once for all heads
        return tuple(head(features) for head in self.heads)
