"""One annotation of a COCO json file, checked against its image."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pcd_ray.evaluate.detect.detection_masks import (
    Segmentation,
    area_of,
    is_box,
    parse_segmentation,
)

CLIPPED = "boxes reach beyond their image by more than a pixel and are clipped"
DEGENERATE = "boxes without a width and height above 0 are left out"
WITHOUT_MASK = "objects are left out: no polygon of their segmentation has 3 points"
BOX_AS_MASK = (
    "objects are left out: their segmentation is 4 numbers, a box in place of a polygon; without "
    "masks (eval.detect.masks=false) they count"
)

LeftOut = Mapping[str, list[int]]
"""What is worth a note -> ids of the annotations or images that it is about."""


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
    item: Mapping[str, Any], width: int, height: int, masks: bool, counts: LeftOut
) -> Annotation | None:
    """Return an annotation, its box clipped; None, noted, where nothing of it can be used.

    Raises:
        ValueError: the box, the area or the mask is wrong, or whether it is a crowd.
    """
    box = _box(item, width, height, counts)
    if box is None:
        return None
    crowd = _crowd(item.get("iscrowd"))
    mask = parse_segmentation(item.get("segmentation"), height=height, width=width)
    if mask is None and masks:
        if not item.get("segmentation"):
            raise ValueError("it has no segmentation; set eval.detect.masks=false for boxes alone")
        counts[BOX_AS_MASK if is_box(item["segmentation"]) else WITHOUT_MASK].append(item["id"])
        return None
    left, top, right, bottom = box
    area = _area(item.get("area"))
    if area is None:
        whole = (right - left) * (bottom - top)
        area = whole if mask is None else area_of(mask, height=height, width=width)
    return Annotation(box, item["category_id"], crowd, area, mask)


def _box(
    item: Mapping[str, Any], width: int, height: int, counts: LeftOut
) -> tuple[float, float, float, float] | None:
    """Return left, top, right, bottom of a box, clipped to its image; None: it has no inside.

    Raises:
        ValueError: it is no box, or lies outside its image.
    """
    given = item.get("bbox")
    if not isinstance(given, list) or len(given) != 4 or not all(map(_is_finite, given)):
        raise ValueError(
            f"bbox={_shown(given)} is not [left, top, width, height] in pixels, four finite numbers"
        )
    left, top, right, bottom = given[0], given[1], given[0] + given[2], given[1] + given[3]
    if right <= left or bottom <= top:
        counts[DEGENERATE].append(item["id"])
        return None
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise ValueError(f"bbox={given} lies outside its image of {width} x {height} px")
    if min(left, top) < -1 or right > width + 1 or bottom > height + 1:
        counts[CLIPPED].append(item["id"])
    return max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)


def _crowd(given: Any) -> bool:
    """Return whether it is a crowd; nothing said is no.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    if given not in (None, 0, 1):
        raise ValueError(f"iscrowd={_shown(given)} is neither 0 nor 1")
    return bool(given)


def _area(given: Any) -> float | None:
    """Return an area; None: none is given.

    Raises:
        ValueError: it is no number of pixels.
    """
    if given is None:
        return None
    if not _is_finite(given) or given < 0:
        raise ValueError(
            f"area={_shown(given)} is no finite number of pixels from 0; without an area it is "
            "computed"
        )
    return float(given)


def _is_finite(value: Any) -> bool:
    """Return whether it is a finite number: text is none, nor is true."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _shown(value: Any) -> str:
    return f"{value!r:.80}"
