"""Confusion matrices of test images -> scores, with intervals, classes and a picture.

Shapes: L classes.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from pcd_ray.evaluate.scores import Scores, bootstrap_interval
from pcd_ray.evaluate.segment.confusion import ImageCounts, score_of, sum_of
from pcd_ray.evaluate.segment.confusion_figure import confusion_png


def segmentation_scores(
    confusions: Mapping[str, Sequence[Tensor]], classes: Sequence[str], *, seed: int
) -> Scores:
    """Return ``miou``, ``macc`` and ``aacc`` of ``val``; of others, the split's name stands before.

    Per-class values are ``iou`` (``test_iou`` and so on), and ``confusion`` in ``about`` holds the
    matrix of each split.

    Args:
        confusions: split -> the confusion matrix (L, L) of each of its images.
        classes: names by label.
        seed: of the bootstrap.

    Raises:
        ShardError: a split has no labelled pixel.
    """
    scores = Scores(values={}, about={"confusion": {}})
    for split, images in confusions.items():
        before = "" if split == "val" else f"{split}_"
        whole = score_of(sum_of(images), classes)
        exact = {"miou": whole.miou_pct, "macc": whole.macc_pct, "aacc": whole.aacc_pct}
        scores.values.update({before + name: value for name, value in exact.items()})
        scores.intervals.update(
            {before + name: each for name, each in _intervals(images, seed=seed).items()}
        )
        scores.test_images.update({before + name: len(images) for name in exact})
        scores.classes[f"{before}iou"] = {
            name: None if math.isnan(value) else value for name, value in whole.iou_pct.items()
        }
        scores.about["confusion"][split] = sum_of(images).tolist()
        scores.pictures[f"{before}confusion.png"] = confusion_png(sum_of(images), classes)
    return scores


def _intervals(images: Sequence[Tensor], *, seed: int) -> dict[str, tuple[float, float]]:
    counts = ImageCounts.of(images)

    def interval(name: str) -> tuple[float, float]:
        return bootstrap_interval(lambda times: counts.scores(times)[name], len(images), seed=seed)

    return {name: interval(name) for name in ("miou", "macc", "aacc")}
