"""Predicted masks of images of any size, whole or in windows that overlap.

Shapes: H x W pixels of an image, Y x X pixels of its mask, L classes, S x S pixels of a window.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pcd_ray.evaluate.features import check_finite

Logits = Callable[[Tensor, int, int], Tensor]
"""Image (1, H, W, 3) uint8, height, width -> logits (1, L, height, width)."""


@torch.no_grad()
def predicted_mask(
    logits: Logits,
    image: Tensor,
    *,
    size_px: tuple[int, int],
    window_px: int = 0,
    stride_px: int = 0,
) -> Tensor:
    """Return the likeliest class of each pixel, (Y, X) uint8 on the CPU.

    Args:
        logits: of a network in eval mode.
        image: (H, W, 3) uint8, on its device.
        size_px: (Y, X).
        window_px: S; 0 or no smaller than the image: the image at once.
        stride_px: pixels from one window to the next, in [1, S]; 0: two thirds of S.

    Raises:
        EvaluationError: logits are not finite.
    """
    height, width = image.shape[:2]
    if not window_px or window_px >= max(height, width):
        found = logits(image[None], *size_px)
    else:
        found = windowed_logits(logits, image, window_px=window_px, stride_px=stride_px)
        if (height, width) != size_px:
            found = F.interpolate(found, size=size_px, mode="bilinear", align_corners=False)
    check_finite(found)
    return found.argmax(dim=1)[0].to(torch.uint8).cpu()


def windowed_logits(logits: Logits, image: Tensor, *, window_px: int, stride_px: int) -> Tensor:
    """Return logits (1, L, H, W), the mean of all windows that see a pixel.

    Windows begin every ``stride_px`` pixels; the last of each side ends where the image does.
    """
    height, width = image.shape[:2]
    stride = stride_px or default_stride(window_px)
    total: Tensor | None = None
    seen = torch.zeros(height, width, device=image.device)
    for top in window_starts(height, window_px, stride):
        for left in window_starts(width, window_px, stride):
            rows = slice(top, min(height, top + window_px))
            columns = slice(left, min(width, left + window_px))
            part = image[rows, columns]
            found = logits(part[None], part.shape[0], part.shape[1])
            if total is None:
                total = found.new_zeros(1, found.shape[1], height, width)
            total[..., rows, columns] += found
            seen[rows, columns] += 1
    assert total is not None
    return total / seen


def default_stride(window_px: int) -> int:
    """Return two thirds of a window's side."""
    return max(1, 2 * window_px // 3)


def window_starts(full: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along a side, such that they cover it and none goes beyond it."""
    if window >= full:
        return [0]
    return [*range(0, full - window, stride), full - window]
