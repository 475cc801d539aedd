"""Scores of predicted masks, from a confusion matrix of pixels.

Shapes: L classes, Y x X mask pixels, N images, R draws of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcd_ray.errors import ShardError


@dataclass(frozen=True, slots=True)
class SegmentationScore:
    """How well predicted masks agree with the truth, over all labelled pixels of a split."""

    miou_pct: float
    """Mean over classes of intersection / union."""
    macc_pct: float
    """Mean over classes of the share of their pixels that were found."""
    aacc_pct: float
    """Share of all pixels that are right."""
    iou_pct: Mapping[str, float]
    """Class name -> intersection / union; NaN for a class in neither truth nor prediction."""


def confusion_matrix(truth: Tensor, predicted: Tensor, *, num_classes: int, void: int) -> Tensor:
    """Return the pixel counts (L, L) int64: rows the true class, columns the predicted one.

    Args:
        truth: labels of any shape; ``void`` pixels do not count.
        predicted: labels of the same shape, each below ``num_classes``.
        num_classes: L.
        void: the label that is not judged.
    """
    judged = truth != void
    pairs = truth[judged].long() * num_classes + predicted[judged].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def sum_of(confusions: Sequence[Tensor]) -> Tensor:
    """Return the confusion matrix (L, L) of all images of a split."""
    return torch.stack(list(confusions)).sum(dim=0)


def score_of(confusion: Tensor, classes: Sequence[str]) -> SegmentationScore:
    """Return the scores of a confusion matrix (L, L).

    Classes in neither truth nor prediction stay out of mIoU, classes not in the truth out of mAcc.

    Raises:
        ShardError: no pixel was counted.
    """
    counts = confusion.double()
    if counts.sum() == 0:
        raise ShardError("the masks have 0 labelled pixels; label some that are not void")
    right = counts.diag()  # (L,)
    truth = counts.sum(dim=1)  # (L,)
    iou = 100 * right / (truth + counts.sum(dim=0) - right)  # (L,); 0 / 0 is NaN: class is absent
    return SegmentationScore(
        miou_pct=float(iou.nanmean()),
        macc_pct=float((100 * right / truth).nanmean()),
        aacc_pct=float(100 * right.sum() / counts.sum()),
        iou_pct=dict(zip(classes, iou.tolist(), strict=True)),
    )


@dataclass(frozen=True, slots=True)
class ImageCounts:
    """Pixels of each test image by class, enough for every score of any draw of images."""

    right: Tensor
    """(N, L) int64: found."""
    truth: Tensor
    """(N, L) int64: in the truth."""
    predicted: Tensor
    """(N, L) int64: predicted, where the truth is not void."""

    @classmethod
    def of(cls, confusions: Sequence[Tensor]) -> "ImageCounts":
        """Return the counts of one confusion matrix (L, L) for each image."""
        return cls(
            right=torch.stack([each.diag() for each in confusions]),
            truth=torch.stack([each.sum(dim=1) for each in confusions]),
            predicted=torch.stack([each.sum(dim=0) for each in confusions]),
        )

    def scores(self, times: Tensor) -> dict[str, Tensor]:
        """Return ``miou``, ``macc`` and ``aacc`` in percent, (R,) each, of R draws of images.

        The classes are those of the whole split in every draw: one that the draw holds no true
        pixel of has its value over the split, since the draw says nothing of it. Left out, it
        would move the mean by as much as it differs from the others. A draw of void images alone
        says nothing of any class, and has the split's ``aacc`` too.

        Args:
            times: how often each image was drawn, (R, N) float64.
        """
        right, truth, predicted = self._totals(times)  # (R, L) each
        whole = self._totals(torch.ones(1, times.shape[1], dtype=torch.float64))  # (1, L) each
        iou, accuracy = (
            torch.where(truth > 0, drawn, split)
            for drawn, split in zip(
                _by_class(right, truth, predicted), _by_class(*whole), strict=True
            )
        )  # (R, L) each; NaN: in neither truth nor prediction of the split
        return {
            "miou": iou.nanmean(dim=1),
            "macc": accuracy.nanmean(dim=1),
            "aacc": torch.where(truth.sum(dim=1) > 0, _overall(right, truth), _overall(*whole[:2])),
        }

    def _totals(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return how many pixels are right, true and predicted, (R, L) each."""
        right, truth, predicted = (
            times @ counts.double() for counts in (self.right, self.truth, self.predicted)
        )
        return right, truth, predicted


def _overall(right: Tensor, truth: Tensor) -> Tensor:
    """Return the share of all pixels that are right, in percent, (R,); 0 / 0 is NaN."""
    return 100 * right.sum(dim=1) / truth.sum(dim=1)


def _by_class(right: Tensor, truth: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and accuracy of each class in percent; 0 / 0 is NaN."""
    return 100 * right / (truth + predicted - right), 100 * right / truth
