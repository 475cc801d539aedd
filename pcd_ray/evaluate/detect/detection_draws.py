"""Average precision of many draws of test images, of detections that are matched once.

COCO's matching looks at one image at a time, so that another draw of images counts the same matches
in other numbers. With each image drawn once it is COCO's average precision.

Shapes: N images, D detections and G objects of one class, T IoU thresholds, R draws.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcd_ray.evaluate.scores import bootstrap_interval

RESAMPLES = 200
"""Draws behind an interval."""

_RECALLS = np.linspace(0, 1, 101)
_MOST = 100  # detections of an image and class that count

_Records = dict[tuple[int, int], list[Any]]  # by image and category
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RankedClass:
    """All detections of one class on all images, the likeliest first."""

    images: NDArray[np.int64]
    """(D,) number of each one's image."""
    right: Bools
    """(T, D) whether it has found an object."""
    ignored: Bools
    """(T, D) whether it counts neither for nor against: it lies in a crowd."""
    objects: NDArray[np.int64]
    """(N,) objects on each image, crowds left out."""

    def average_precision(self, times: Floats) -> Floats:
        """Return AP in [0, 1], (R, T), of draws; NaN where a draw has no object.

        Args:
            times: how often each image was drawn, (R, N).
        """
        objects = times @ self.objects  # (R,)
        weights = times[:, self.images]  # (R, D)
        found = np.stack(
            [
                _interpolated(weights[:, counts], right[counts], objects)
                for right, counts in zip(self.right, ~self.ignored, strict=True)
            ],
            axis=1,
        )  # (R, T)
        return np.where(objects[:, None] > 0, found, np.nan)


def ranked_classes(judged: Any) -> list[RankedClass]:
    """Return what an evaluation of faster-coco-eval has matched, class by class.

    Args:
        judged: a ``COCOeval_faster`` whose ``evaluate`` has run.
    """
    truth, found = (_grouped(records.anns.values()) for records in (judged.cocoGt, judged.cocoDt))
    return [_ranked(judged, category, truth, found) for category in judged.params.catIds]


def intervals_of(
    classes: Sequence[RankedClass], thresholds: Sequence[float], *, seed: int
) -> dict[str, tuple[float, float]]:
    """Return 95% bootstrap intervals over images of ``ap``, ``ap50`` and ``ap75``, in percent.

    Args:
        classes: of one evaluation.
        thresholds: IoU by place, T of them.
        seed: of the draws.
    """
    places = {"ap": slice(None), "ap50": _place(thresholds, 0.5), "ap75": _place(thresholds, 0.75)}
    images = len(classes[0].objects)
    drawn: list[Floats] = []

    def means(times: Tensor) -> Tensor:
        drawn.append(mean_over_classes(classes, times.numpy()))  # (R, T)
        return torch.from_numpy(drawn[-1].mean(axis=1))

    found = {"ap": bootstrap_interval(means, images, seed=seed, resamples=RESAMPLES)}
    every = np.concatenate(drawn)
    for name in ("ap50", "ap75"):
        low, high = np.quantile(every[:, places[name]], [0.025, 0.975])
        found[name] = (float(low), float(high))
    return found


def mean_over_classes(classes: Sequence[RankedClass], times: Floats) -> Floats:
    """Return AP in percent, (R, T), the mean over the classes that have objects.

    The classes are those of all images in every draw: one that the draw holds no object of has its
    value over all images, since the draw says nothing of it.
    """
    having = [each for each in classes if each.objects.any()]
    total = np.zeros((len(times), len(classes[0].right)))
    for each in having:
        whole = each.average_precision(np.ones((1, times.shape[1])))
        found = each.average_precision(times)
        total += np.where(np.isnan(found), whole, found)
    return 100 * total / max(1, len(having))


def _place(thresholds: Sequence[float], wanted: float) -> slice:
    place = int(np.argmin(np.abs(np.asarray(thresholds) - wanted)))
    return slice(place, place + 1)


def _interpolated(weights: Floats, right: Bools, objects: Floats) -> Floats:
    """Return AP (R,) at 101 recalls; of no objects it has no meaning.

    Precision matters where an object is found: between two of them it falls, and the largest of
    those at or beyond a recall is taken.

    Args:
        weights: how often each detection that counts was drawn, (R, d).
        right: (d,).
        objects: (R,).
    """
    hits = np.flatnonzero(right)
    if not len(hits):
        return np.zeros(len(weights))
    starts = np.concatenate([[0], hits[:-1] + 1])
    among = np.add.reduceat(weights[:, : hits[-1] + 1], starts, axis=1).cumsum(axis=1)  # (R, h)
    found = weights[:, hits].cumsum(axis=1)  # (R, h)
    precision = np.divide(found, among, out=np.zeros_like(found), where=among > 0)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = found / np.maximum(objects, 1)[:, None]
    padded = np.concatenate([precision, np.zeros((len(weights), 1))], axis=1)
    means = [
        row[np.searchsorted(reached, _RECALLS, side="left")].mean()
        for row, reached in zip(padded, recall, strict=True)
    ]
    return np.array(means)


def _grouped(records: Iterable[Any]) -> _Records:
    groups: _Records = defaultdict(list)
    for record in records:
        groups[record["image_id"], record["category_id"]].append(record)
    return groups


def _ranked(judged: Any, category: int, truth: _Records, found: _Records) -> RankedClass:
    count = len(judged.params.iouThrs)
    objects, images, scores = [], [], []
    right: list[Bools] = [np.zeros((count, 0), np.bool_)]
    ignored: list[Bools] = [np.zeros((count, 0), np.bool_)]
    for number, image in enumerate(judged.params.imgIds):
        there, seen = truth.get((image, category), []), found.get((image, category), [])
        crowd = np.array([bool(one["iscrowd"]) for one in there], np.bool_)
        objects.append(int((~crowd).sum()))
        if not seen:
            continue
        order = np.argsort([-one["score"] for one in seen], kind="mergesort")[:_MOST]
        scores += [seen[place]["score"] for place in order]
        images += [number] * len(order)
        overlaps = np.reshape(judged.ious[image, category], (len(order), len(there)))
        hit, passed = _matched(overlaps, crowd, np.asarray(judged.params.iouThrs))
        right.append(hit)
        ignored.append(passed)
    rank = np.argsort(-np.array(scores), kind="mergesort")
    return RankedClass(
        images=np.array(images, np.int64)[rank],
        right=np.concatenate(right, axis=1)[:, rank],
        ignored=np.concatenate(ignored, axis=1)[:, rank],
        objects=np.array(objects, np.int64),
    )


def _matched(overlaps: Floats, crowd: Bools, thresholds: Floats) -> tuple[Bools, Bools]:
    """Return which detections of an image find an object, and which lie in a crowd, (T, d) each.

    The likeliest chooses first: the free object that it overlaps most, else a crowd.

    Args:
        overlaps: IoU of detections, the likeliest first, with objects, (d, G).
        crowd: (G,).
        thresholds: (T,).
    """
    right = np.zeros((len(thresholds), len(overlaps)), np.bool_)
    ignored = np.zeros_like(right)
    if not overlaps.size:
        return right, ignored
    least = np.minimum(thresholds, 1 - 1e-10)
    singles = overlaps[:, ~crowd]  # (d, g)
    in_crowd = overlaps[:, crowd].max(axis=1, initial=0.0)  # (d,)
    free = np.ones((len(thresholds), singles.shape[1]), np.bool_)
    rows = np.arange(len(thresholds))
    for place, row in enumerate(singles):
        if len(row):
            open_to = np.where(free, row, -1.0)  # (T, g)
            # of equal overlaps COCO takes the last
            best = open_to.shape[1] - 1 - open_to[:, ::-1].argmax(axis=1)  # (T,)
            right[:, place] = open_to[rows, best] >= least
            free[rows[right[:, place]], best[right[:, place]]] = False
        ignored[:, place] = ~right[:, place] & (in_crowd[place] >= least)
    return right, ignored
