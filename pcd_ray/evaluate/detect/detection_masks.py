"""Instance masks: polygons and run-length codes to bitmaps, and bitmaps to what COCO files hold.

A segmentation is polygons (flat x, y lists in pixels of its image), or a run-length code
``{"size": [H, W], "counts": ...}``: column by column, counts as a list or in COCO's compression.

Shapes: N instances, H x W pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as mask_api
from numpy.typing import NDArray
from PIL import Image

from pcd_ray.errors import ShardError

Polygons = tuple[NDArray[np.float64], ...]
"""Outlines that together make one instance, each (points, 2): x, y in pixels."""
RunLengths = dict[str, Any]
"""A run-length code, its counts as COCO's compressed text."""
Segmentation = Polygons | RunLengths | None
"""None: the annotation has no mask."""

Bitmap = NDArray[np.uint8]

_FAR_SIDES = 10  # long sides of an image: filling an outline takes memory along its whole length


def parse_segmentation(given: Any, *, height: int, width: int) -> Segmentation:
    """Return the segmentation of a COCO annotation, checked; None where it holds none.

    Outlines of less than three points enclose nothing and are left out; so are boxes.

    Raises:
        ValueError: it is none of the three forms, or not of this image's size.
    """
    if not given:
        return None
    if isinstance(given, dict):
        return _parse_run_lengths(given, height=height, width=width)
    if is_box(given):
        return None
    if not isinstance(given, list) or not all(isinstance(outline, list) for outline in given):
        raise ValueError(
            "its segmentation is neither a list of polygons [[x, y, x, y, x, y, ...], ...] nor a "
            "run-length code"
        )
    outlines = [_outline(outline) for outline in given]
    if any(len(outline) % 2 for outline in outlines):
        raise ValueError("a polygon of it has an odd count of numbers, not x, y, x, y, ...")
    if not all(np.isfinite(outline).all() for outline in outlines):
        raise ValueError("a polygon of it has a coordinate that is not finite")
    far = _FAR_SIDES * max(height, width)
    if any(abs(outline).max(initial=0) > far for outline in outlines):
        raise ValueError(
            f"a polygon of it has a coordinate beyond {far} px, its image is {width} x {height} px"
        )
    return tuple(outline.reshape(-1, 2) for outline in outlines if len(outline) >= 6) or None


def is_box(given: Any) -> bool:
    """Return whether a segmentation is 4 numbers, or lists of 4: boxes in place of polygons."""
    outlines = given if isinstance(given, list) and isinstance(given[0], list) else [given]
    return all(
        isinstance(outline, list)
        and len(outline) == 4
        and all(type(number) in (int, float) for number in outline)
        for outline in outlines
    )


def _outline(given: list[Any]) -> NDArray[np.float64]:
    """Return an outline's numbers; text is none, nor is true.

    Raises:
        ValueError: it holds something else.
    """
    if not all(type(number) in (int, float) for number in given):
        raise ValueError("its polygons hold something else than numbers")
    try:
        return np.array(given, np.float64)
    except OverflowError:  # of hundreds of digits
        raise ValueError("a polygon of it has a coordinate that is not finite") from None


def _parse_run_lengths(given: dict[str, Any], *, height: int, width: int) -> RunLengths:
    size = given.get("size")
    if size != [height, width]:
        raise ValueError(f"its run-length code is of size {size}, its image {[height, width]}")
    try:
        code = mask_api.segmToRle(given, width, height)
        mask_api.decode(code)  # nothing else looks at how far the runs reach
    except (ValueError, TypeError, KeyError, RuntimeError):
        raise ValueError("its run-length code does not cover its image") from None
    return _as_text(code)


def segmentation_values(segmentation: Segmentation) -> Any:
    """Return a segmentation as the plain value of a COCO file."""
    if segmentation is None or isinstance(segmentation, dict):
        return segmentation
    return [outline.ravel().tolist() for outline in segmentation]


def run_lengths_of(bitmap: Bitmap) -> RunLengths:
    """Return a bitmap (H, W) of 0 and 1 as a compressed run-length code, plain text inside."""
    return _as_text(mask_api.encode(np.asfortranarray(bitmap)))


def _as_text(code: dict[str, Any]) -> RunLengths:
    counts = code["counts"]
    text = counts.decode() if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in code["size"]], "counts": text}


def bitmap_of(
    segmentation: Polygons | RunLengths,
    *,
    from_size: tuple[int, int],
    to_size: tuple[int, int],
    flipped: bool = False,
) -> Bitmap:
    """Return the bitmap (H, W) of a segmentation on its image, resized and perhaps mirrored.

    Polygons are scaled before they are filled, so that nothing is lost when images shrink.

    Args:
        segmentation: in pixels of the image as it is stored.
        from_size: (height, width) of that image.
        to_size: (height, width) of the bitmap.
        flipped: mirror left and right.
    """
    (height, width), (new_height, new_width) = from_size, to_size
    if isinstance(segmentation, dict):
        whole = np.ascontiguousarray(mask_api.decode(segmentation))
        resized = Image.fromarray(whole).resize((new_width, new_height), Image.Resampling.NEAREST)
        bitmap: Bitmap = np.asarray(resized)
        return np.ascontiguousarray(bitmap[:, ::-1]) if flipped else bitmap
    scale = np.array([new_width / width, new_height / height])
    outlines = [outline * scale for outline in segmentation]
    if flipped:
        outlines = [np.array([new_width, 0]) + outline * [-1, 1] for outline in outlines]
    code = mask_api.segmToRle([o.ravel().tolist() for o in outlines], new_width, new_height)
    return np.ascontiguousarray(mask_api.decode(code))


def area_of(segmentation: Polygons | RunLengths, *, height: int, width: int) -> float:
    """Return the pixels that a segmentation covers on its image."""
    code = mask_api.segmToRle(segmentation_values(segmentation), width, height)
    return float(mask_api.area(code))


def stacked(bitmaps: Sequence[Bitmap], *, height: int, width: int) -> Bitmap:
    """Return bitmaps as one array (N, H, W); N may be 0."""
    if not bitmaps:
        return np.zeros((0, height, width), np.uint8)
    return np.stack(bitmaps)


def damaged(annotation: Any, file: str, reason: str) -> ShardError:
    """Return the error of one annotation: where, what and what to do."""
    return ShardError(f"{file}: annotation {annotation}: {reason}; mend or remove it")
