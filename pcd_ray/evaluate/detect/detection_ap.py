"""Average precision of detections by COCO's rules, with faster-coco-eval.

Shapes: T IoU thresholds, R recalls, K classes, A ranges of area, M limits of detections per image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

from pcd_ray.evaluate.detect.detection import Detections
from pcd_ray.evaluate.detect.detection_data import DetectionImage
from pcd_ray.evaluate.detect.detection_draws import intervals_of, ranked_classes
from pcd_ray.evaluate.detect.detection_masks import run_lengths_of, segmentation_values

Result = dict[str, Any]
"""One detection as COCO's results files hold it."""

_RANGES = ("all", "small", "medium", "large")  # of areas, below and above 32^2 and 96^2 px


@dataclass(frozen=True, slots=True)
class AveragePrecision:
    """Average precision in percent; None: there is no such object."""

    summary: dict[str, float | None]
    """``ap`` (mean over IoU 0.50 to 0.95), ``ap50``, ``ap75``, ``ap_small``, ``ap_medium`` and
    ``ap_large``, means over classes."""
    classes: dict[str, float | None]
    """Class -> ``ap`` of it, by name: names differ."""
    intervals: dict[str, tuple[float, float]]
    """95% bootstrap intervals of ``ap``, ``ap50`` and ``ap75`` over the images."""


def results_of(
    image: DetectionImage, found: Detections, category_ids: Sequence[int]
) -> list[Result]:
    """Return the detections of an image as COCO's results files hold them.

    Args:
        image: the image.
        found: what was found on it.
        category_ids: ids of the json files, by label.
    """
    left, top, right, bottom = found.boxes.double().unbind(1)
    boxes = np.stack([left, top, right - left, bottom - top], 1).round(3)
    results = [
        {
            "image_id": image.id,
            "category_id": int(category_ids[label]),
            "bbox": box,
            "score": score,
        }
        for label, box, score in zip(
            found.labels.tolist(), boxes.tolist(), found.scores.tolist(), strict=True
        )
    ]
    if found.masks is not None:
        for result, mask in zip(results, found.masks.numpy(), strict=True):
            result["segmentation"] = run_lengths_of(mask)
    return results


def average_precision(
    images: Sequence[DetectionImage],
    results: Sequence[Result],
    *,
    classes: Sequence[str],
    category_ids: Sequence[int],
    of: Literal["bbox", "segm"],
    seed: int = 0,
) -> AveragePrecision:
    """Return how well detections agree with the truth.

    What lies in a crowd region counts neither for nor against; at most 100 detections of an image
    count.

    Args:
        images: all images judged, those without detections too.
        results: detections on them, with the ids of the json files; empty ones score 0.
        classes: names, by label; each once.
        category_ids: ids of the json files, by label.
        of: boxes or masks.
        seed: of the bootstrap.
    """
    judged = evaluated(images, results, category_ids=category_ids, of=of)
    judged.accumulate()
    precision: NDArray[np.float64] = judged.eval["precision"]  # (T, R, K, A, M)
    thresholds = list(np.round(judged.params.iouThrs, 2))
    at = {share: [thresholds.index(share)] for share in (0.5, 0.75)}
    whole = precision[:, :, :, 0, -1]
    summary = {
        "ap": _mean_pct(whole),
        "ap50": _mean_pct(whole[at[0.5]]),
        "ap75": _mean_pct(whole[at[0.75]]),
    }
    for place, name in enumerate(_RANGES[1:], start=1):
        summary[f"ap_{name}"] = _mean_pct(precision[:, :, :, place, -1])
    by_class = {name: _mean_pct(whole[:, :, label]) for label, name in enumerate(classes)}
    intervals = intervals_of(ranked_classes(judged), judged.params.iouThrs, seed=seed)
    return AveragePrecision(summary, by_class, intervals)


def evaluated(
    images: Sequence[DetectionImage],
    results: Sequence[Result],
    *,
    category_ids: Sequence[int],
    of: Literal["bbox", "segm"],
) -> Any:
    """Return faster-coco-eval's evaluation, detections matched; arguments as above.

    Images and classes are numbered anew, from 1 in their order: the library takes ids for floating
    point numbers, in which those from 2**53 on are not told apart.
    """
    truth = COCO(truth_of(images, num_classes=len(category_ids)))
    found = truth.loadRes(renumbered(images, results, category_ids=category_ids, of=of))
    judged = COCOeval_faster(truth, found, of, print_function=_silent)
    judged.evaluate()
    return judged


def truth_of(images: Sequence[DetectionImage], *, num_classes: int) -> dict[str, Any]:
    """Return images and what is marked on them as a COCO file holds them, numbered from 1."""
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        for row, (left, top, right, bottom) in enumerate(image.boxes.tolist()):
            annotation = {
                "id": len(annotations) + 1,  # an object of id 0 would never be found
                "image_id": number,
                "category_id": int(image.labels[row]) + 1,
                "bbox": [left, top, right - left, bottom - top],
                "area": float(image.areas[row]),
                "iscrowd": int(image.crowd[row]),
            }
            mask = segmentation_values(image.segmentations[row])
            annotations.append(annotation if mask is None else annotation | {"segmentation": mask})
    return {
        "images": [
            {"id": number, "width": image.width, "height": image.height}
            for number, image in enumerate(images, start=1)
        ],
        "categories": [{"id": label + 1, "name": str(label)} for label in range(num_classes)],
        "annotations": annotations,
    }


def renumbered(
    images: Sequence[DetectionImage],
    results: Sequence[Result],
    *,
    category_ids: Sequence[int],
    of: Literal["bbox", "segm"],
) -> list[Result]:
    """Return results with the numbers of `truth_of`, and with what is scored alone.

    A box beside a mask is left out: its area would mix up sizes.
    """
    number_of = {image.id: number for number, image in enumerate(images, start=1)}
    class_of = {id_: number for number, id_ in enumerate(category_ids, start=1)}
    key = "bbox" if of == "bbox" else "segmentation"
    return [
        {
            "image_id": number_of[result["image_id"]],
            "category_id": class_of[result["category_id"]],
            "score": result["score"],
            key: result[key],
        }
        for result in results
    ]


def _mean_pct(precision: NDArray[np.float64]) -> float | None:
    there = precision[precision > -1]  # -1: a class, or a size, without objects
    return float(100 * there.mean()) if there.size else None


def _silent(*_: object) -> None:
    """Print nothing."""
