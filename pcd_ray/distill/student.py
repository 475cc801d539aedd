"""The student: backbone -> MHSA neck -> projection head.

Shapes: B images of S x S pixels, C backbone channels, D embedding channels, H x W positions.
"""

from torch import Tensor, nn

from pcd_ray.distill.backbones import Backbone
from pcd_ray.distill.mhsa import MhsaNeck


class Student(nn.Module):
    """The network that learns; the backbone is what is kept."""

    def __init__(self, backbone: Backbone, neck: MhsaNeck, head: nn.Sequential) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, S, S, 3) uint8 images to (B, D, H, W), not normalised."""
        result: Tensor = self.head(self.neck(self.backbone(images)))
        return result
