"""Semantic segmentation by fine-tuning: a backbone with dilated last stages and an FCN head.

Shapes: B images of H x W pixels, C channels, h x w map positions, L classes, S x S pixels of crops.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pcd_ray.distill.backbones import Backbone, freeze_unused, map_shape
from pcd_ray.evaluate.judged_network import JudgedNetwork
from pcd_ray.evaluate.segment.segmentation_data import VOID, SegmentationData
from pcd_ray.seeds import derive_seed

Crop = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Pixels (S, S, 3) and labels (S, S)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FcnSettings:
    """The network and its training images."""

    output_stride: int
    """Pixels per position of the map; 0: the network's own."""
    head_channels: int
    """0: a quarter of the map's."""
    dropout: float
    crop_px: int
    """S."""
    min_scale: float
    max_scale: float
    flip_prob: float
    head_lr_scale: float
    seed: int
    """Of the head's first weights."""


class Fcn(nn.Module):
    """A backbone and an FCN head: 3x3 convolution, BatchNorm, ReLU, dropout, 1x1 convolution."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return the loss of crops (B, S, S, 3) uint8 with labels (B, S, S)."""
        images, masks = batch
        height, width = masks.shape[1:]
        return {"loss": mean_over_labelled(self.logits(images, height, width), masks)}

    def logits(self, images: Tensor, height: int, width: int) -> Tensor:
        """Return logits (B, L, height, width) of images (B, H, W, 3) uint8, bilinearly enlarged."""
        logits = self.head(self.backbone(images)).float()  # (B, L, h, w)
        return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FcnTask:
    """Fine-tune a network as an FCN on the training split of a set."""

    network: JudgedNetwork = field(compare=False)
    identity: str
    """Of the network: a hash of what its features follow from."""
    data: SegmentationData
    settings: FcnSettings

    @property
    def num_images(self) -> int:
        """Images of the training split."""
        return len(self.data.names("train"))

    def build(self) -> Fcn:
        """Return the network with its own weights and a fresh head.

        Raises:
            ConfigError: it has no map of this stride, or takes no crops of this size.
            WeightsError: the weights do not fit.
        """
        crop = self.settings.crop_px
        with torch.random.fork_rng(devices=[]):  # nobody's draws depend on whether it was built
            torch.manual_seed(derive_seed(self.settings.seed, "fcn_head"))
            backbone = self.network.backbone(output_stride=self.settings.output_stride)
            channels, _, _ = map_shape(backbone, crop, option="eval.segment.crop_px")
            head = self._head(channels)
        freeze_unused(backbone, crop)
        return Fcn(backbone, head)

    def example(self, index: int, seed: int) -> Crop:
        """Return a crop of a training image; a function of ``(index, seed)`` alone."""
        image, mask = self.data.decoded(self.data.names("train")[index])
        # what is trained on is of the size that is judged on
        relative = self.data.size_px / image.height if self.data.size_px else 1.0
        fill = tuple(round(255 * mean) for mean in self.network.mean)
        return random_crop(image, mask, self.settings, relative_size=relative, fill=fill, seed=seed)

    def collate(self, examples: list[Any], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return crops (B, S, S, 3) and labels (B, S, S), both uint8, on a device."""
        images, masks = (torch.from_numpy(np.stack(part)) for part in zip(*examples, strict=True))
        if device.type == "cuda":
            images, masks = images.pin_memory(), masks.pin_memory()
        return images.to(device, non_blocking=True), masks.to(device, non_blocking=True)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return two groups, backbone and head, the second with its own rate."""
        assert isinstance(model, Fcn)
        trained = [p for p in model.backbone.parameters() if p.requires_grad]
        return [
            {"params": trained},
            {"params": list(model.head.parameters()), "lr_scale": self.settings.head_lr_scale},
        ]

    def _head(self, channels: int) -> nn.Sequential:
        width = self.settings.head_channels or max(1, channels // 4)
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout(self.settings.dropout),
            nn.Conv2d(width, len(self.data.classes), 1),
        )


def mean_over_labelled(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the cross-entropy in nats of logits (B, L, Y, X), mean over labelled pixels.

    The mean is over the labelled pixels of all ranks, such that the ranks' mean of what they return
    is what one process would have; a collective.
    """
    total = F.cross_entropy(logits, masks.long(), ignore_index=VOID, reduction="sum")
    pixels = (masks != VOID).sum()
    ranks = 1
    if dist.is_initialized() and dist.get_world_size() > 1:
        ranks = dist.get_world_size()
        dist.all_reduce(pixels)
    return ranks * total / pixels.clamp(min=1)


def random_crop(
    image: Image.Image,
    mask: NDArray[np.uint8],
    settings: FcnSettings,
    *,
    relative_size: float,
    fill: tuple[int, ...],
    seed: int,
) -> Crop:
    """Resize an image and its labels by a random factor, cut a square out, perhaps flip it.

    Only the part that is seen is resized. Where the image is smaller than the square, it lies at
    its top left, and the rest has the colour ``fill`` and void labels.

    Args:
        image: in RGB.
        mask: its labels (Y, X).
        settings: side of the square, factors, probability of a flip.
        relative_size: further factor of the size.
        fill: colour, 0 to 255.
        seed: of the draws.
    """
    random = np.random.default_rng(seed)
    scale = relative_size * random.uniform(settings.min_scale, settings.max_scale)
    side = settings.crop_px
    sides, starts = [], []
    for full in image.size:  # width, then height
        scaled = max(1, round(full * scale))
        sides.append(min(side, scaled))
        start = random.integers(scaled - sides[-1] + 1)
        starts.append((start * full / scaled, (start + sides[-1]) * full / scaled))
    (left, right), (top, bottom) = starts
    width, height = sides
    box = (left, top, right, bottom)
    seen = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    labels = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST, box=box)
    pixels = np.full((side, side, 3), fill, np.uint8)
    truth = np.full((side, side), VOID, np.uint8)
    flip = slice(None, None, -1 if random.random() < settings.flip_prob else 1)
    pixels[:height, :width] = np.asarray(seen)[:, flip]
    truth[:height, :width] = np.asarray(labels)[:, flip]
    return pixels, truth
