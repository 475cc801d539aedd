"""Networks that pool themselves: their map recentred on their own vector (ours).

A vision transformer's class token and CLIP's attention pooling are no mean of the map, so a head
trained on them says nothing of its positions' mean. ``x - mean(x) + vector`` has the vector as its
mean and keeps every difference between positions: SpatialAdaptor's law then holds against the
head's output on the network's own vector.

Shapes: B images, C channels, V channels of attention's values, H x W positions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from torch import Tensor, nn


def has_own_vector(body: nn.Module) -> bool:
    """Whether a timm network has a class token or pools by attention over its map."""
    return has_class_token(body) or attention_pool(body) is not None


def has_class_token(body: nn.Module) -> bool:
    """Whether the first token of a timm network's features is its class token."""
    return getattr(body, "cls_token", None) is not None and _num_prefix_tokens(body) > 0


def patches_of(features: Tensor, body: nn.Module) -> Tensor:
    """Return tokens (B, N, C) without class, distillation and register tokens, which come first."""
    return features[:, _num_prefix_tokens(body) :]


def recentred_map(maps: Tensor, features: Tensor, body: nn.Module) -> Tensor:
    """Return the map whose mean is the network's own vector, in float32 or wider.

    Args:
        maps: (B, C, H, W) positions of ``features``.
        features: what timm's ``forward_features`` gives: tokens, behind the final norm where the
            network has one there, or the map itself.
        body: a network of which `has_own_vector`.

    Returns:
        (B, C, H, W), or (B, V, H, W) for attention pooling: each position's value, without its
        place (as MaskCLIP makes CLIP dense); what is left is the pool's projection.
    """
    pool = attention_pool(body)
    if pool is None:
        return _recentred(maps, features[:, 0])
    weight, _ = value_weights(pool)  # a bias would cancel
    return _recentred(F.conv2d(maps, weight[:, :, None, None]), pool(maps, pre_logits=True))


def attention_pool(body: nn.Module) -> nn.Module | None:
    """Return the attention pooling at the end of a CLIP ResNet; None: it has none."""
    head = getattr(body, "head", None)
    return head if isinstance(head, AttentionPool2d | RotAttentionPool2d) else None


def value_weights(pool: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight (V, C) and bias (V,) of the layer that makes values of positions."""
    if pool.qkv is None:
        return pool.v.weight, pool.v.bias
    bias = pool.qkv.bias
    return pool.qkv.weight.chunk(3)[2], None if bias is None else bias.chunk(3)[2]


def _recentred(maps: Tensor, vector: Tensor) -> Tensor:
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return wide - wide.mean((2, 3), keepdim=True) + vector.to(wide.dtype)[:, :, None, None]


def _num_prefix_tokens(body: nn.Module) -> int:
    return int(getattr(body, "num_prefix_tokens", 0))
