"""The effective receptive field of a map: how much each pixel of the image moves its centre unit.

Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks"
(2016): the absolute gradient of the centre unit with respect to the image, averaged over images.

The unit here is the feature of the position in the middle, its channels added up under random
signs, anew for each image: in a plain sum channels cancel, behind a LayerNorm all of them.

Shapes: B images of H x W pixels, C channels, h x w map positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pcd_ray.errors import EvaluationError
from pcd_ray.evaluate.features import FeatureMap, brought_to


def effective_receptive_field(feature_map: FeatureMap, images: Tensor, *, seed: int = 0) -> Tensor:
    """Return the share of each pixel in what moves the map's centre unit, (H, W), float64, CPU.

    Shares sum to 1, unless no pixel moves the unit: then all are 0. The colours of a pixel are
    added up. The centre is position (h // 2, w // 2).

    Args:
        feature_map: a frozen network; with a neck, ``nn.Sequential(backbone, neck).eval()``.
        images: uint8 (B, H, W, 3); with six photographs the side at
            50% lay within a tenth of that of fourteen.
        seed: of the signs.

    Raises:
        ValueError: the network is in train mode.
        EvaluationError: gradients are infinite or NaN.
    """
    random = torch.Generator().manual_seed(seed)
    moved = torch.zeros(images.shape[1:3], dtype=torch.float64)
    for image in images:  # one by one: memory for gradients of one image is enough
        pixels = brought_to(feature_map, image[None]).float().requires_grad_()
        with torch.enable_grad():
            features = feature_map(pixels)[0]  # (C, h, w)
            unit = features[:, features.shape[1] // 2, features.shape[2] // 2]  # (C,)
        signs = torch.randint(0, 2, unit.shape, generator=random) * 2 - 1
        (gradient,) = torch.autograd.grad(unit, pixels, signs.to(unit))
        moved += gradient[0].abs().sum(dim=2).double().cpu()
    total = float(moved.sum())
    if not math.isfinite(total):
        raise EvaluationError(
            f"receptive field: the gradients of the map's centre add up to {total}; the network "
            "has diverged or its weights are damaged: take an earlier checkpoint"
        )
    return moved / (total or 1)


def area_50_side(field: Tensor) -> int:
    """Return the side in pixels of the smallest square that holds half of a field (H, W).

    Its area is the field's area at 50%. The square lies wherever it holds most, and may stand
    out of an image that is no square.
    """
    side, _, _ = area_50_square(field)
    return side


def area_50_square(field: Tensor) -> tuple[int, int, int]:
    """Return side, top and left, in pixels, of the smallest square that holds half of a field."""
    height, width = field.shape
    largest = max(height, width)
    top, left = (largest - height) // 2, (largest - width) // 2
    padded = F.pad(field.double(), (left, largest - width - left, top, largest - height - top))
    sums = F.pad(padded.cumsum(0).cumsum(1), (1, 0, 1, 0))  # (largest + 1, largest + 1)
    half = 0.5 * float(sums[-1, -1]) * (1 - 1e-9)  # sums are exact to rounding
    low, high = 1, largest
    while low < high:
        middle = (low + high) // 2
        if float(_held(sums, middle).max()) >= half:
            high = middle
        else:
            low = middle + 1
    held = _held(sums, low)
    row, column = divmod(int(held.argmax()), held.shape[1])
    return low, row - top, column - left


def _held(sums: Tensor, side: int) -> Tensor:
    """Return what each square of a side holds, by its top and left, from cumulated sums."""
    return sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
