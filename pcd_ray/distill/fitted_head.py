"""Heads for teachers that published none, fitted on their own frozen features (ours).

`pca_head` is a fixed rotation of the feature space. `contrastive_head` is an MLP that learns, on
cached pooled features, to give two views of an image the same embedding: what a self-supervised
teacher's own head has learnt, so that SpatialAdaptor has one to reshape.

Shapes: P pixels, N images, V views of each, C backbone channels, D embedding channels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcd_ray.errors import WeightsError

_PIXELS_AT_ONCE = 65_536
_IMAGES_PER_STEP = 256
_LEARNING_RATE = 1e-3
_WEIGHT_DECAY = 1e-4


def pca_head(pixels: Tensor, *, dim: int, whiten: float) -> nn.Sequential:
    """Return one fixed Linear: the ``dim`` principal components of (P, C) pixels.

    Each component is divided by its standard deviation to the power ``whiten`` (0: not at all,
    1: white), relative to the first one's so that scales stay comparable. An affine head, so
    SpatialAdaptor's law holds by itself.

    Raises:
        WeightsError: fewer pixels or channels than components, or pixels that do not vary.
    """
    count, channels = pixels.shape
    check_pca_width(dim, pixels=count, channels=channels)
    mean = pixels.mean(dim=0, dtype=torch.float64)  # (C,)
    covariance = torch.zeros(channels, channels, dtype=torch.float64, device=pixels.device)
    for chunk in pixels.split(_PIXELS_AT_ONCE):  # no second, twice as large copy of all pixels
        centred = chunk - mean  # in float64
        covariance.addmm_(centred.T, centred, alpha=1 / (count - 1))
    variances, axes = torch.linalg.eigh(covariance)  # ascending
    variances, axes = variances.flip(0)[:dim].clamp(min=0), axes.flip(1)[:, :dim]
    if not variances[0] > 0:
        raise WeightsError(
            "the teacher's pixels do not vary (variance 0); check its weights, or use "
            "larger images (augment.image_size_px)"
        )
    # an eigenvector's sign is arbitrary: fix it, so that the same pixels give the same head
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    scale = (variances / variances[0]).clamp(min=1e-6).sqrt() ** -whiten  # (dim,)
    weight = (axes * scale).T  # (dim, C)
    linear = nn.Linear(channels, dim)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(-weight @ mean)
    return nn.Sequential(linear).eval()


def check_pca_width(dim: int, *, pixels: int, channels: int) -> None:
    """Refuse more principal components than so many pixels of so many channels have.

    Raises:
        WeightsError: ``dim`` is too large.
    """
    most = min(pixels - 1, channels)
    if dim > most:
        raise WeightsError(
            f"teacher.fit.dim={dim} exceeds what {pixels} pixels of {channels} channels hold; "
            f"use at most {most}"
        )


@dataclass(frozen=True, slots=True)
class ContrastiveHead:
    """A fitted MLP and how well it tells images apart."""

    head: nn.Sequential
    """For vectors, in eval mode."""
    top1_pct: float
    """Share of views, in percent, whose nearest other view among `_IMAGES_PER_STEP` images' is one
    of the same image; on the features that it was fitted on."""


def contrastive_head(
    features: Tensor, *, hidden: int, dim: int, temperature: float, steps: int, seed: int
) -> ContrastiveHead:
    """Fit Linear, BatchNorm, ReLU, Linear such that views of an image agree and others do not.

    The loss is InfoNCE in both directions between two of an image's views, drawn anew each step,
    with the batch's other images as negatives. AdamW, a cosine schedule. The same features and
    seed give the same head.

    Args:
        features: (V, N, C) pooled features of V views of N images.
        hidden: width of the hidden layer.
        dim: width D of the embedding.
        temperature: of the loss, > 0.
        steps: optimiser steps.
        seed: root of initial weights, batches and views drawn.

    Raises:
        WeightsError: fewer than two views or images, or features that do not vary.
    """
    views, images, channels = features.shape
    if views < 2 or images < 2:
        raise WeightsError(
            f"a head is fitted on at least 2 views of 2 images, got {views} of {images}; raise "
            "teacher.fit.views or teacher.fit.images"
        )
    spread = features.flatten(0, 1).std(dim=0)
    if not spread.max() > 0:
        raise WeightsError(
            "the teacher's features do not vary (deviation 0); check its weights, or use "
            "larger images (augment.image_size_px)"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Sequential(
            nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim)
        ).to(features.device)
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=_WEIGHT_DECAY)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _learning_rate(step, steps)
        optimizer.zero_grad()
        one, other = _two_views(features, random)
        pairs = head(torch.cat([one, other]))  # one batch, one set of BatchNorm statistics
        _info_nce(*pairs.chunk(2), temperature=temperature).backward()
        optimizer.step()
    head.requires_grad_(False).eval()
    return ContrastiveHead(head.cpu(), _retrieval_pct(head, features))


def _learning_rate(step: int, steps: int) -> float:
    return _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))


def _two_views(features: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return two different views (B, C) each of B images drawn without repetition."""
    views, images, _ = features.shape
    rows = torch.randperm(images, generator=random)[:_IMAGES_PER_STEP]
    first = torch.randint(views, (len(rows),), generator=random)
    second = (first + torch.randint(1, views, (len(rows),), generator=random)) % views
    return features[first, rows], features[second, rows]


def _info_nce(one: Tensor, other: Tensor, *, temperature: float) -> Tensor:
    logits = F.normalize(one, dim=1) @ F.normalize(other, dim=1).T / temperature  # (B, B)
    own = torch.arange(len(one), device=one.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@torch.no_grad()
def _retrieval_pct(head: nn.Sequential, features: Tensor) -> float:
    some = features[:2, :_IMAGES_PER_STEP].cpu()
    one, other = (F.normalize(head(view), dim=1) for view in some)
    own = torch.arange(len(one))
    return 100 * float(((one @ other.T).argmax(dim=1) == own).float().mean())
