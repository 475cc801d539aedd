"""One image of a detection set -> what a detector is trained on: resized, mirrored, with targets.

Shapes: N objects, H x W pixels of the network's input.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pcd_ray.evaluate.detect.detection_data import DetectionImage
from pcd_ray.evaluate.detect.detection_masks import bitmap_of, stacked
from pcd_ray.seeds import derive_seed

_STEP_PX = 32  # short sides are drawn in steps of this


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionExample:
    """One input of a detector with its targets."""

    image: Tensor
    """(H, W, 3) uint8."""
    boxes: Tensor
    """(N, 4) float32: left, top, right, bottom in pixels of ``image``."""
    labels: Tensor
    """(N,) int64, from 1: 0 is the background."""
    masks: Tensor | None
    """(N, H, W) uint8 of 0 and 1; None: boxes alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionViews:
    """How images are resized and mirrored, for training and for judging."""

    min_short_side_px: int
    """Training draws the short side from here ..."""
    max_short_side_px: int
    """... to here, in steps of 32 pixels; judging takes this one."""
    max_long_side_px: int
    """The long side never gets longer; the short one then stays below its draw."""
    flip_prob: float
    """Probability of mirroring left and right."""
    max_pixels: int = field(compare=False)
    """Images with more pixels are refused ..."""
    max_decode_s: float = field(compare=False)
    """... as those whose decoding takes more seconds of processor time."""
    masks: bool
    """Whether targets have masks."""

    def drawn(self, image: DetectionImage, seed: int) -> DetectionExample:
        """Return an image as it is trained on; equal seeds give equal examples.

        Crowds are no targets. Objects that shrink to nothing stay, at least a box of theirs.

        Raises:
            ShardError: the image cannot be decoded or has another size than its record.
        """
        random = np.random.default_rng(derive_seed(seed, "detection"))
        sides = [*range(self.min_short_side_px, self.max_short_side_px, _STEP_PX)]
        short_side = int(random.choice([*sides, self.max_short_side_px]))
        size = self.size_of(image, short_side)
        flipped = bool(random.random() < self.flip_prob)
        pixels = _resized(self.pixels_of(image), size)
        shown = ~image.crowd
        boxes = image.boxes[shown] * _scale(image, size)  # (N, 4)
        if flipped:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
            boxes[:, [0, 2]] = size[1] - boxes[:, [2, 0]]
        return DetectionExample(
            image=torch.from_numpy(pixels),
            boxes=torch.from_numpy(boxes).float(),
            labels=torch.from_numpy(image.labels[shown] + 1),
            masks=self._masks(image, size, flipped=flipped) if self.masks else None,
        )

    def judged(self, image: DetectionImage) -> Tensor:
        """Return an image (H, W, 3) uint8 as a detector is judged on it.

        Raises:
            ShardError: as for `drawn`.
        """
        size = self.size_of(image, self.max_short_side_px)
        return torch.from_numpy(_resized(self.pixels_of(image), size))

    def pixels_of(self, image: DetectionImage) -> Image.Image:
        """Return an image as it is stored, upright, in RGB.

        Raises:
            ShardError: as for `drawn`.
        """
        return image.pixels(max_pixels=self.max_pixels, max_decode_s=self.max_decode_s)

    def size_of(self, image: DetectionImage, short_side: int) -> tuple[int, int]:
        """Return (H, W) of an image whose short side is to be ``short_side``, its shape kept."""
        short, long = sorted((image.width, image.height))
        scale = min(short_side / short, self.max_long_side_px / long)
        return max(1, round(image.height * scale)), max(1, round(image.width * scale))

    def _masks(self, image: DetectionImage, size: tuple[int, int], *, flipped: bool) -> Tensor:
        bitmaps = [
            bitmap_of(
                segmentation, from_size=(image.height, image.width), to_size=size, flipped=flipped
            )
            for segmentation, crowd in zip(image.segmentations, image.crowd, strict=True)
            if segmentation is not None and not crowd
        ]
        return torch.from_numpy(stacked(bitmaps, height=size[0], width=size[1]))


def _scale(
    image: DetectionImage, size: tuple[int, int]
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    across, down = size[1] / image.width, size[0] / image.height
    return np.array([across, down, across, down])


def _resized(
    image: Image.Image, size: tuple[int, int]
) -> "np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]":
    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(image, np.uint8)
