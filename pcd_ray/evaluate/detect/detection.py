"""Mask R-CNN and Faster R-CNN with a feature pyramid (FPN) on any timm backbone with stages.

The heads, samplers and losses are torchvision's. Nothing is frozen; norms in pyramid and heads are
BatchNorm, which becomes SyncBatchNorm with the backbone's when several GPUs train.

Shapes: B images, H x W pixels, N objects or detections of one image, C channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from pcd_ray.distill.backbones import Backbone
from pcd_ray.errors import ConfigError

STRIDES = (4, 8, 16, 32)
"""Pixels per position of the backbone's maps; the pyramid adds one of 64."""

BoxHead = Literal["4conv1fc", "2fc"]

_CHANNELS = 256
_HIDDEN = 1024
_LEVELS = tuple(str(level) for level in range(len(STRIDES)))
_PAD_TO_PX = 64  # so that the coarsest map, too, divides images without a rest


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionBatch:
    """Images of any sizes; targets while training."""

    images: list[Tensor]
    """(H, W, 3) uint8 each."""
    targets: list[dict[str, Tensor]] | None
    """For each image ``boxes`` (N, 4) float32, ``labels`` (N,) int64 from 1 and, where masks are
    learned, ``masks`` (N, H, W) uint8."""


class Detector(nn.Module):
    """Faster R-CNN, or Mask R-CNN where masks are asked for."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int,
        masks: bool,
        box_head: BoxHead = "4conv1fc",
        rois_per_image: int = 512,
    ) -> None:
        """Put a pyramid and new heads on a backbone, whose modules it takes over.

        Args:
            backbone: its weights keep timm's names under ``body.``; its own mean and std normalise.
            num_classes: without the background.
            masks: predict a mask for each box.
            box_head: four convolutions with BatchNorm and one linear layer, or two linear layers,
                which have no norm.
            rois_per_image: regions that train the box head, per image.

        Raises:
            ConfigError: the backbone has no maps of stride 4, 8, 16 and 32.
        """
        super().__init__()
        self.body = backbone.body
        self.taps, channels = taps_of(backbone)
        self.register_buffer("mean", backbone.mean.clone(), persistent=False)
        self.register_buffer("std", backbone.std.clone(), persistent=False)
        _freeze_unused(self.body, self.taps)
        self.fpn = FeaturePyramidNetwork(
            channels, _CHANNELS, extra_blocks=LastLevelMaxPool(), norm_layer=nn.BatchNorm2d
        )
        self.rpn = _region_proposals()
        self.roi_heads = _roi_heads(num_classes, masks, box_head, rois_per_image)

    def forward(self, batch: DetectionBatch) -> Any:
        """Return the losses by name in train mode, else the detections of each image.

        Detections are ``boxes`` (N, 4), ``labels`` (N,) from 1, ``scores`` (N,) and, with masks,
        ``masks`` (N, 1, 28, 28) probabilities inside the boxes; boxes are in pixels of the input.
        """
        images = self._padded(batch.images)
        maps = self.fpn(
            dict(zip(_LEVELS, pyramid(self.body, images.tensors, self.taps), strict=True))
        )
        # coordinates of hundreds of pixels need float32, whatever the backbone computes in
        with torch.autocast(images.tensors.device.type, enabled=False):
            maps = {level: _precise(each) for level, each in maps.items()}
            proposals, rpn_losses = self.rpn(images, maps, batch.targets)
            found, roi_losses = self.roi_heads(maps, proposals, images.image_sizes, batch.targets)
        return {**rpn_losses, **roi_losses} if self.training else found

    def _padded(self, images: Sequence[Tensor]) -> ImageList:
        """Return normalised images in one batch, zeros at the right and below the smaller ones."""
        sizes = [(int(image.shape[0]), int(image.shape[1])) for image in images]
        height, width = (
            math.ceil(max(sides) / _PAD_TO_PX) * _PAD_TO_PX for sides in zip(*sizes, strict=True)
        )
        normal = [
            (image.permute(2, 0, 1).to(self.mean.dtype) - self.mean) / self.std for image in images
        ]
        padded = [F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in normal]
        return ImageList(torch.stack(padded), sizes)  # (B, 3, H, W)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pyramid(body: Any, images: Tensor, taps: Sequence[int]) -> list[Tensor]:
    """Return maps (B, C, h, w) of the whole timm network at the stages ``taps``."""
    maps: list[Tensor] = body.forward_intermediates(
        images, indices=list(taps), stop_early=True, output_fmt="NCHW", intermediates_only=True
    )
    return maps


@torch.no_grad()
def taps_of(backbone: Backbone) -> tuple[list[int], list[int]]:
    """Return the stages whose maps have `STRIDES`, and their channels, seen by a forward pass.

    Raises:
        ConfigError: there are no such stages.
    """
    body: Any = backbone.body
    listed = [int(stage["reduction"]) for stage in getattr(body, "feature_info", [])]
    if not set(STRIDES) <= set(listed):
        has = ", ".join(map(str, sorted(set(listed)))) or "unknown strides"
        raise ConfigError(
            f"{backbone.name} has maps of stride {has}; a detector needs 4, 8, 16 and 32: choose a "
            "backbone with stages (ResNet, ConvNeXt, MobileNet, EfficientNet, ...)"
        )
    taps = [len(listed) - 1 - listed[::-1].index(stride) for stride in STRIDES]
    sides = (2 * _PAD_TO_PX, 3 * _PAD_TO_PX)
    was_training = body.training
    try:
        maps = pyramid(body.eval(), torch.zeros(1, 3, *sides, device=backbone.mean.device), taps)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{backbone.name} gives no maps of {sides[0]} x {sides[1]} px images "
            f"({str(error).splitlines()[0]}); choose a backbone that takes images of any size"
        ) from error
    finally:
        body.train(was_training)
    for stride, each in zip(STRIDES, maps, strict=True):
        if tuple(each.shape[2:]) != (sides[0] // stride, sides[1] // stride):
            raise ConfigError(
                f"{backbone.name}: its map of stride {stride} is {each.shape[2]} x "
                f"{each.shape[3]} for {sides[0]} x {sides[1]} px; choose another backbone"
            )
    return taps, [int(each.shape[1]) for each in maps]


def _freeze_unused(body: nn.Module, taps: Sequence[int]) -> None:
    """Freeze weights behind the last map, which get no gradient that DDP could wait for."""
    was_training = body.training
    device = next(body.parameters()).device
    with torch.enable_grad():
        maps = pyramid(body.eval(), torch.zeros(1, 3, _PAD_TO_PX, _PAD_TO_PX, device=device), taps)
        total = torch.stack([each.sum() for each in maps]).sum()
        weights = [weight for weight in body.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(total, weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_(gradient is not None)
    body.train(was_training)


def _region_proposals() -> RegionProposalNetwork:
    """Return torchvision's proposal network with one anchor size for each level."""
    sizes = tuple((8 * stride,) for stride in (*STRIDES, 2 * STRIDES[-1]))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return RegionProposalNetwork(
        anchors,
        RPNHead(_CHANNELS, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )


def _pooler(side: int) -> MultiScaleRoIAlign:
    """Return torchvision's RoIAlign, told the strides of the maps.

    It would guess them from the first batch it sees, by heights without the padding: of images of
    80 px, padded to 128, it takes every map for one of half its stride.
    """
    pooler = MultiScaleRoIAlign(list(_LEVELS), output_size=side, sampling_ratio=2)
    pooler.scales = [1 / stride for stride in STRIDES]
    pooler.map_levels = initLevelMapper(int(math.log2(STRIDES[0])), int(math.log2(STRIDES[-1])))
    return pooler


def _roi_heads(num_classes: int, masks: bool, box_head: BoxHead, rois_per_image: int) -> RoIHeads:
    side = 7
    head = (
        TwoMLPHead(_CHANNELS * side**2, _HIDDEN)
        if box_head == "2fc"
        else FastRCNNConvFCHead(
            (_CHANNELS, side, side), [_CHANNELS] * 4, [_HIDDEN], norm_layer=nn.BatchNorm2d
        )
    )
    heads = RoIHeads(
        _pooler(side),
        head,
        FastRCNNPredictor(_HIDDEN, num_classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=rois_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
    )
    if masks:
        heads.mask_roi_pool = _pooler(14)
        heads.mask_head = MaskRCNNHeads(_CHANNELS, [_CHANNELS] * 4, 1, norm_layer=nn.BatchNorm2d)
        heads.mask_predictor = MaskRCNNPredictor(_CHANNELS, _CHANNELS, num_classes + 1)
    return heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """What was found on one image, in its stored size."""

    boxes: Tensor
    """(N, 4): left, top, right, bottom in pixels."""
    labels: Tensor
    """(N,) numbers of classes, from 0."""
    scores: Tensor
    """(N,) in [0, 1], falling."""
    masks: Tensor | None
    """(N, H, W) uint8 of 0 and 1."""


@torch.no_grad()
def detect(
    detector: Detector, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
) -> list[Detections]:
    """Return what an eval-mode detector finds, on the CPU.

    Args:
        detector: on any device.
        images: (H, W, 3) uint8 each, as the network sees them.
        sizes: (height, width) of each image as it is stored.
    """
    device = detector.mean.device
    found = detector(DetectionBatch(images=[each.to(device) for each in images], targets=None))
    return [
        _in_stored_size(each, (int(image.shape[0]), int(image.shape[1])), size)
        for each, image, size in zip(found, images, sizes, strict=True)
    ]


def _in_stored_size(
    found: dict[str, Tensor], from_size: tuple[int, int], to_size: tuple[int, int]
) -> Detections:
    down, across = (to / of for to, of in zip(to_size, from_size, strict=True))
    boxes = found["boxes"].cpu() * torch.tensor([across, down, across, down])
    masks = None
    if "masks" in found:
        pasted = paste_masks_in_image(found["masks"].cpu(), boxes, to_size)  # (N, 1, H, W)
        masks = (pasted[:, 0] >= 0.5).to(torch.uint8)
    return Detections(
        boxes=boxes, labels=found["labels"].cpu() - 1, scores=found["scores"].cpu(), masks=masks
    )
