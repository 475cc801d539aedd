"""Features of images from a frozen network.

Shapes: B images, N images in all, C channels, h x w map positions.
"""

from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from pcd_ray.errors import EvaluationError, ShardError

FeatureMap = Callable[[Tensor], Tensor]
"""uint8 images (B, H, W, 3) -> float map (B, C, h, w) on any device; normalises inside."""


@torch.no_grad()
def frozen_map(feature_map: FeatureMap, images: Tensor) -> Tensor:
    """Return the float32 map (B, C, h, w) of uint8 images (B, H, W, 3), without gradients.

    Images go to the device of a network that is a module; the map stays where it was made.

    Raises:
        ValueError: the network is in train mode, so that a batch would change its statistics.
        EvaluationError: the map holds infinities or NaN.
    """
    features = feature_map(brought_to(feature_map, images)).float()
    check_finite(features)
    return features


def brought_to(feature_map: FeatureMap, images: Tensor) -> Tensor:
    """Return images on the device of a network that is a module, and in eval mode.

    Raises:
        ValueError: the network is in train mode.
    """
    if not isinstance(feature_map, nn.Module):
        return images
    if feature_map.training:
        raise ValueError("the network is in train mode; call .eval() before evaluating it")
    return images.to(next(chain(feature_map.parameters(), feature_map.buffers())).device)


def check_finite(features: Tensor) -> None:
    """Refuse features that no distance or classifier can use.

    Raises:
        EvaluationError: infinities or NaN among ``features`` (N, ...).
    """
    bad = int((~torch.isfinite(features)).flatten(1).any(dim=1).sum())
    if bad:
        raise EvaluationError(
            f"features: {bad} of {len(features)} images have infinite or NaN values; the network "
            "has diverged or its weights are damaged: take an earlier checkpoint, or train again "
            "with a lower optim.base_lr"
        )


def pooled_features(feature_map: FeatureMap, batches: Iterable[Tensor]) -> Tensor:
    """Return the spatial mean of each image's map, (N, C) float32 on the CPU, in order.

    Args:
        feature_map: an eval-mode network.
        batches: uint8 images, (B, H, W, 3) each; the sizes may differ between batches.

    Raises:
        EvaluationError: a feature is infinite or NaN.
        ShardError: there are no images.
    """
    pooled = [frozen_map(feature_map, images).mean(dim=(2, 3)).cpu() for images in batches]
    if not pooled:
        raise ShardError("features: there are 0 images to compute them of; give at least one")
    return torch.cat(pooled)
