"""Semantic segmentation with a linear classifier on a frozen map.

Each position's features are standardised per channel and mapped to class logits (a 1x1
convolution); logits are upsampled bilinearly to the mask. The recipe is one for all networks and
sets: Adam on mini-batches of images with a cosine schedule from zero weights, a convex problem.
It was chosen by the training loss alone, never by a validation score.

Shapes: B images, C channels, h x w map positions, L classes, Y x X mask pixels.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from pcd_ray.errors import ShardError
from pcd_ray.evaluate.features import FeatureMap, frozen_map
from pcd_ray.evaluate.segment.confusion import SegmentationScore, confusion_matrix, score_of, sum_of
from pcd_ray.evaluate.segment.segmentation_data import VOID, SegmentationData
from pcd_ray.progress import counted, progress
from pcd_ray.seeds import derive_seed

_IMAGES_PER_STEP = 16
_LEARNING_RATE = 3e-3  # falls to zero along half a cosine
_LABELS_PER_POSITION = 4  # per side; 8 scored within 0.1 mIoU on CamVid at stride 32, 2.6x slower


@dataclass(frozen=True, slots=True)
class LinearHead:
    """Logits of a position's raw features: ``features @ weight + bias``."""

    weight: Tensor  # (C, L)
    bias: Tensor  # (L,)

    def predict(self, features: Tensor, *, height_px: int, width_px: int) -> Tensor:
        """Return the likeliest class of each pixel, (B, Y, X) uint8, of a map (B, C, h, w)."""
        weight, bias = (each.to(features.device) for each in (self.weight, self.bias))
        logits = features.permute(0, 2, 3, 1) @ weight + bias  # (B, h, w, L)
        masks = [  # one by one: full-size logits of many classes are large
            upsampled(one[None], height=height_px, width=width_px).argmax(dim=3) for one in logits
        ]
        return torch.cat(masks).to(torch.uint8)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The scores of a linear probe and the classifier itself."""

    scores: Mapping[str, SegmentationScore]
    """Split -> its scores."""
    confusions: Mapping[str, Sequence[Tensor]]
    """Split -> the confusion matrix (L, L) of each of its images, in its order."""
    head: LinearHead

    def predict(
        self, feature_map: FeatureMap, images: Tensor, *, size_px: tuple[int, int] | None = None
    ) -> Tensor:
        """Return masks (B, Y, X) uint8 on the CPU of uint8 images (B, H, W, 3).

        Args:
            feature_map: the network that the probe was trained on.
            images: as the data set gives them.
            size_px: (Y, X) of the masks; the images' own by default.
        """
        height, width = size_px or (images.shape[1], images.shape[2])
        features = frozen_map(feature_map, images)
        return self.head.predict(features, height_px=height, width_px=width).cpu()


@dataclass(frozen=True, slots=True)
class _Example:
    """One training image."""

    features: Tensor  # (h, w, C) float32
    labels: Tensor  # (up to 4h, up to 4w) uint8


def linear_probe_miou(
    feature_map: FeatureMap,
    data: SegmentationData,
    *,
    seed: int,
    splits: Sequence[str] = ("val",),
    batch_size: int = 16,
    num_steps: int = 1000,
) -> ProbeResult:
    """Train a linear classifier on the frozen map of ``train`` and score it on ``splits``.

    Features are computed once per image; those of ``train`` stay in memory (4hwC bytes each).
    Training sees labels at four points per map position and side, scores the masks in full size.
    Equal seeds give equal scores.

    Args:
        feature_map: an eval-mode network.
        data: images and masks.
        seed: root of the order in which training images are drawn.
        splits: splits to score.
        batch_size: images per forward pass of the network.
        num_steps: optimiser steps.

    Raises:
        ShardError: the set lacks a split, a file is damaged, or a split has no labelled pixel.
        EvaluationError: a feature is infinite or NaN.
    """
    for split in splits:
        data.names(split)  # refuse unknown splits before any work
    examples, device = _examples(feature_map, data, batch_size=batch_size)
    mean, std = _statistics(examples)
    scaled = [replace(item, features=(item.features - mean) / std) for item in examples]
    weight, bias = _fit(
        scaled, device, num_classes=len(data.classes), num_steps=num_steps, seed=seed
    )
    weight = weight / std.to(device)[:, None]  # fold the standardisation into the classifier
    head = LinearHead(weight, bias - mean.to(device) @ weight)
    confusions = {
        split: _confusions(head, feature_map, data, split=split, batch_size=batch_size)
        for split in splits
    }
    scores = {split: score_of(sum_of(each), data.classes) for split, each in confusions.items()}
    return ProbeResult(scores, confusions, head)


def upsampled(logits: Tensor, *, height: int, width: int) -> Tensor:
    """Return logits (B, h, w, L) at (B, height, width, L), bilinearly, corners not aligned.

    Equal to ``F.interpolate``, written as two matrix products: deterministic on every device, also
    backwards.
    """
    rows = _interpolation(logits.shape[1], height, like=logits)  # (height, h)
    columns = _interpolation(logits.shape[2], width, like=logits)  # (width, w)
    tall = torch.einsum("yh,bhwl->bywl", rows, logits)
    return torch.einsum("xw,bywl->byxl", columns, tall)


def _interpolation(old: int, new: int, *, like: Tensor) -> Tensor:
    """Return the matrix (new, old) of linear interpolation along one side."""
    unit = torch.eye(old, device=like.device, dtype=like.dtype)
    return F.interpolate(unit[None], size=new, mode="linear", align_corners=False)[0].T


def _labels_for(masks: Tensor, *, height: int, width: int) -> Tensor:
    """Return the labels of masks (B, Y, X) at the grid that a map (height, width) is trained on."""
    sides = zip((height, width), masks.shape[1:], strict=True)
    rows, columns = (_centres(full, min(full, _LABELS_PER_POSITION * side)) for side, full in sides)
    return masks[:, rows[:, None], columns]


def _centres(full: int, count: int) -> Tensor:
    """Return the pixels at the centres of ``count`` equal parts of a side of ``full`` pixels."""
    return ((torch.arange(count) + 0.5) * (full / count)).long()


def _examples(
    feature_map: FeatureMap, data: SegmentationData, *, batch_size: int
) -> tuple[list[_Example], torch.device]:
    """Return the training images' raw features and labels, and the network's device."""
    examples: list[_Example] = []
    device = torch.device("cpu")
    for images, masks in _counted_batches(data, "train", "features", batch_size):
        features = frozen_map(feature_map, images)  # (B, C, h, w)
        device = features.device
        labels = _labels_for(masks, height=features.shape[2], width=features.shape[3])
        examples += map(_Example, features.permute(0, 2, 3, 1).cpu(), labels)
    if all(bool((example.labels == VOID).all()) for example in examples):
        raise ShardError(f"{data.uri}: train has 0 labelled pixels; label some that are not void")
    return examples, device


def _counted_batches(
    data: SegmentationData, split: str, what: str, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    with progress(f"{what} of {split}", "images", len(data.names(split))) as shown:
        for images, masks in data.batches(split, batch_size=batch_size):
            yield images, masks
            shown.add(len(images))


def _statistics(examples: Sequence[_Example]) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation (C,) over all positions; constant channels have 1."""
    count = sum(example.features[..., 0].numel() for example in examples)
    total = sum(example.features.double().sum(dim=(0, 1)) for example in examples)
    mean = torch.as_tensor(total) / count
    squares = sum(((item.features.double() - mean) ** 2).sum(dim=(0, 1)) for item in examples)
    std = (torch.as_tensor(squares) / count).sqrt()
    constant = std <= 1e-6 * mean.abs()  # what float32 leaves of a channel that never varies
    return mean.float(), torch.where(constant, torch.ones_like(std), std).float()


def _fit(
    examples: Sequence[_Example],
    device: torch.device,
    *,
    num_classes: int,
    num_steps: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return weight (C, L) and bias (L,) for standardised features."""
    channels = examples[0].features.shape[2]
    weight = torch.zeros(channels, num_classes, device=device, requires_grad=True)
    bias = torch.zeros(num_classes, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=_LEARNING_RATE)
    batches = _batches(examples, seed=derive_seed(seed, "linear_probe"))
    batches = counted(islice(batches, num_steps), "linear probe", "steps", num_steps)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        optimizer.zero_grad()
        _mean_loss(batch, weight, bias).backward()
        optimizer.step()
    return weight.detach(), bias.detach()


def _batches(examples: Sequence[_Example], *, seed: int) -> Iterator[list[list[_Example]]]:
    """Yield batches for ever, each as groups of equal size; an epoch is a new permutation."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    while True:
        while len(drawn) < _IMAGES_PER_STEP:
            drawn += torch.randperm(len(examples), generator=generator).tolist()
        groups: dict[torch.Size, list[_Example]] = {}
        for index in drawn[:_IMAGES_PER_STEP]:
            groups.setdefault(examples[index].features.shape, []).append(examples[index])
        drawn = drawn[_IMAGES_PER_STEP:]
        yield list(groups.values())


def _mean_loss(batch: Sequence[Sequence[_Example]], weight: Tensor, bias: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats over the labelled pixels of a batch."""
    total, pixels = torch.zeros((), device=weight.device), 0
    for group in batch:
        features = torch.stack([item.features for item in group]).to(weight.device)  # (B, h, w, C)
        labels = torch.stack([item.labels for item in group])  # (B, 4h, 4w)
        logits = upsampled(features @ weight + bias, height=labels.shape[1], width=labels.shape[2])
        truth = labels.flatten().to(weight.device, torch.int64)
        total = total + F.cross_entropy(
            logits.flatten(0, 2), truth, ignore_index=VOID, reduction="sum"
        )
        pixels += int((labels != VOID).sum())
    return total / max(pixels, 1)


def _confusions(
    head: LinearHead,
    feature_map: FeatureMap,
    data: SegmentationData,
    *,
    split: str,
    batch_size: int,
) -> list[Tensor]:
    """Return the confusion matrix of each image of a split."""
    found: list[Tensor] = []
    for images, masks in _counted_batches(data, split, "predictions", batch_size):
        height, width = masks.shape[1:]
        features = frozen_map(feature_map, images)
        predicted = head.predict(features, height_px=height, width_px=width).cpu()
        found += [
            confusion_matrix(truth, mask, num_classes=len(data.classes), void=VOID)
            for truth, mask in zip(masks, predicted, strict=True)
        ]
    return found
