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
    """Class -> ``ap`` of it."""
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
        results: detections on them; empty ones score 0.
        classes: names, by label.
        category_ids: ids of the json files, by label.
        of: boxes or masks.
        seed: of the bootstrap.
    """
    judged = evaluated(images, results, classes=classes, category_ids=category_ids, of=of)
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
    order = np.argsort(category_ids)  # COCO's, by id
    by_class = {
        classes[label]: _mean_pct(whole[:, :, place]) for place, label in enumerate(order.tolist())
    }
    intervals = intervals_of(ranked_classes(judged), judged.params.iouThrs, seed=seed)
    return AveragePrecision(summary, {name: by_class[name] for name in classes}, intervals)


def evaluated(
    images: Sequence[DetectionImage],
    results: Sequence[Result],
    *,
    classes: Sequence[str],
    category_ids: Sequence[int],
    of: Literal["bbox", "segm"],
) -> Any:
    """Return faster-coco-eval's evaluation, detections matched; arguments as above."""
    truth = COCO(truth_of(images, classes=classes, category_ids=category_ids))
    found = truth.loadRes([_own_kind(result, of) for result in results])
    judged = COCOeval_faster(truth, found, of, print_function=_silent)
    judged.evaluate()
    return judged


def truth_of(
    images: Sequence[DetectionImage], *, classes: Sequence[str], category_ids: Sequence[int]
) -> dict[str, Any]:
    """Return images and what is marked on them as a COCO file holds them."""
    annotations: list[dict[str, Any]] = []
    for image in images:
        for row, (left, top, right, bottom) in enumerate(image.boxes.tolist()):
            annotation = {
                "id": len(annotations) + 1,  # an object of id 0 would never be found
                "image_id": image.id,
                "category_id": int(category_ids[image.labels[row]]),
                "bbox": [left, top, right - left, bottom - top],
                "area": float(image.areas[row]),
                "iscrowd": int(image.crowd[row]),
            }
            mask = segmentation_values(image.segmentations[row])
            annotations.append(annotation if mask is None else annotation | {"segmentation": mask})
    return {
        "images": [{"id": i.id, "width": i.width, "height": i.height} for i in images],
        "categories": [
            {"id": int(id_), "name": name} for id_, name in zip(category_ids, classes, strict=True)
        ],
        "annotations": annotations,
    }


def _own_kind(result: Result, of: str) -> Result:
    """Return a result with what is judged alone: an area of its box would mix up sizes."""
    kept = {key: result[key] for key in ("image_id", "category_id", "score")}
    key = "bbox" if of == "bbox" else "segmentation"
    return {**kept, key: result[key]}


def _mean_pct(precision: NDArray[np.float64]) -> float | None:
    there = precision[precision > -1]  # -1: a class, or a size, without objects
    return float(100 * there.mean()) if there.size else None


def _silent(*_: object) -> None:
    """Print nothing."""
