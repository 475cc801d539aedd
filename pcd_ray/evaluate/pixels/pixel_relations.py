"""How one pixel of an image relates to the others: similarity of features, attention of the neck.

A pixel is (x, y), counted from the left and from the top; it is asked about through the position of
the map whose cell it lies in, the map being spread evenly over the image.

Shapes: H x W pixels, C channels, h x w map positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pcd_ray.distill.mhsa import MhsaLayer
from pcd_ray.distill.student import Student
from pcd_ray.evaluate.features import FeatureMap, frozen_map

Place = tuple[float, float]
"""(x, y): pixels from the left and the top of an image, or shares of its width and height."""


def pixel_of(share: Place, height: int, width: int) -> Place:
    """Return the middle of the pixel at shares in [0, 1] of an image's width and height."""
    x, y = (
        min(int(part * size), size - 1) for part, size in zip(share, (width, height), strict=True)
    )
    return x + 0.5, y + 0.5


def position_of(pixel: Place, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Return the row and the column of the map position that a pixel lies in.

    Args:
        pixel: (x, y).
        size: H, W of the image.
        grid: h, w of the map.

    Raises:
        ValueError: the pixel is not in the image.
    """
    (x, y), (height, width) = pixel, size
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f"pixel ({x:g}, {y:g}) is outside the image of {width} x {height} pixels; "
            f"give x in [0, {width}) and y in [0, {height})"
        )
    return int(y * grid[0] / height), int(x * grid[1] / width)


def similarity_map(
    network: FeatureMap, image: Tensor, pixel: Place, *, other: Tensor | None = None
) -> Tensor:
    """Return the cosine of a pixel's feature with that of every position, (h, w) on the CPU.

    Args:
        network: a frozen network, e.g. a `Backbone` in eval mode.
        image: uint8 (H, W, 3), which the pixel is in.
        pixel: (x, y) in pixels of the image.
        other: another image, of any size that the network takes, whose positions are compared;
            None: the image itself.

    Raises:
        ValueError: the pixel is not in the image, or the network is in train mode.
        EvaluationError: features are infinite or NaN.
    """
    features = frozen_map(network, image[None])[0]  # (C, h, w)
    row, column = position_of(pixel, _size(image), (features.shape[1], features.shape[2]))
    compared = features if other is None else frozen_map(network, other[None])[0]
    return cosines(features[:, row, column], compared).cpu()


def cosines(feature: Tensor, features: Tensor) -> Tensor:
    """Return the cosine (h, w) of a feature (C,) with those of a map (C, h, w); 0 of a zero."""
    return F.cosine_similarity(features, feature[:, None, None], dim=0)


@torch.no_grad()
def attention_maps(student: Student, image: Tensor, pixel: Place) -> Tensor:
    """Return the weights by which a pixel's position attends to all, (layers, heads, h, w).

    The weights of a layer's head sum to 1; the first layer looks at the backbone's map, each
    other one at what the layer before it gives.

    Args:
        student: in eval mode, with an MHSA neck.
        image: uint8 (H, W, 3).
        pixel: (x, y) in pixels of the image.

    Raises:
        ValueError: the student has no neck or is in train mode, or the pixel is not in the image.
        EvaluationError: features are infinite or NaN.
    """
    layers = [layer for layer in student.neck if isinstance(layer, MhsaLayer)]
    if not layers:
        raise ValueError("the student has no MHSA neck (student.mhsa.depth=0): nothing attends")
    features = frozen_map(student.backbone, image[None])  # (1, C, h, w)
    place = position_of(pixel, _size(image), (features.shape[2], features.shape[3]))
    weights = []
    for layer in layers:
        weights.append(layer.attention(features, *place)[0].cpu())
        features = layer(features)
    return torch.stack(weights)


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[0], image.shape[1]
