"""One annotation of a COCO json file, checked against its image."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pcd_ray.evaluate.detect.detection_masks import Segmentation, area_of, parse_segmentation

CLIPPED = "boxes reach beyond their image by more than a pixel and are clipped"
DEGENERATE = "boxes without width or height are left out"
WITHOUT_MASK = "objects without a mask are left out"


@dataclass(frozen=True, slots=True)
class Annotation:
    """What is marked on an image, checked."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels, inside the image."""
    category_id: int
    crowd: bool
    area: float
    segmentation: Segmentation


def annotation_of(
    item: Mapping[str, Any], width: int, height: int, masks: bool, counts: Counter[str]
) -> Annotation | None:
    """Return an annotation, its box clipped; None, counted, where nothing of it can be used.

    Raises:
        ValueError: the box or the mask is wrong.
    """
    box = _box(item.get("bbox"), width, height, counts)
    if box is None:
        return None
    crowd = bool(item.get("iscrowd", 0))
    mask = parse_segmentation(item.get("segmentation"), height=height, width=width)
    if mask is None and masks:
        if not item.get("segmentation"):
            raise ValueError("it has no segmentation; set eval.detect.masks=false for boxes alone")
        counts[WITHOUT_MASK] += 1
        return None
    left, top, right, bottom = box
    area = item.get("area")
    if area is None:
        whole = (right - left) * (bottom - top)
        area = whole if mask is None else area_of(mask, height=height, width=width)
    return Annotation(box, item["category_id"], crowd, float(area), mask)


def _box(
    given: Any, width: int, height: int, counts: Counter[str]
) -> tuple[float, float, float, float] | None:
    """Return left, top, right, bottom of a box, clipped to its image; None: it has no inside.

    Raises:
        ValueError: it is no box, or lies outside its image.
    """
    if not isinstance(given, list) or len(given) != 4 or not _finite(given):
        raise ValueError(f"bbox={given!r} is not [left, top, width, height] in pixels")
    left, top, right, bottom = given[0], given[1], given[0] + given[2], given[1] + given[3]
    if right <= left or bottom <= top:
        counts[DEGENERATE] += 1
        return None
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise ValueError(f"bbox={given} lies outside its image of {width} x {height} px")
    if min(left, top) < -1 or right > width + 1 or bottom > height + 1:
        counts[CLIPPED] += 1
    return max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)


def _finite(values: Sequence[Any]) -> bool:
    try:
        return bool(np.isfinite(np.array(values, np.float64)).all())
    except (TypeError, ValueError):
        return False
