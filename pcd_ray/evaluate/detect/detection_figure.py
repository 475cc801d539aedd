"""Detections beside the truth, as PNG bytes.

Colours tell classes apart, safe for colour-blind readers (Tol's muted set).

Shapes: N objects of an image, H x W its pixels.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from PIL import Image

from pcd_ray.evaluate.detect.detection_data import DetectionImage
from pcd_ray.evaluate.detect.detection_masks import Segmentation, bitmap_of

SHOWN_SCORE = 0.5
"""Detections below this score are not drawn, unless it is an image's best one."""

_WIDTH_IN = 10.0
_DPI = 130
_HIGHEST = 0.8  # of a picture, in its width
_MOST_PX = 640  # pixels of an image's long side in the figure
_INK, _FAINT = "#2b2f36", "#6b7280"
_VEIL = 0.5  # how much of a mask's colour is seen
# fmt: off
_COLOURS = (
    "#88ccee", "#cc6677", "#ddcc77", "#44aa99", "#aa4499", "#e69f00",
    "#117733", "#332288", "#999933", "#882255", "#0072b2", "#661100",
)
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """Objects marked on an image."""

    boxes: NDArray[np.float64]
    """(N, 4): left, top, right, bottom in pixels."""
    labels: Sequence[int]
    """N numbers of classes, from 0."""
    scores: Sequence[float | None]
    """N of them; None: the truth."""
    segmentations: Sequence[Segmentation]
    """N masks."""


def marked_from_truth(image: DetectionImage) -> Marked:
    """Return what a set says of an image, crowds left out."""
    shown = np.flatnonzero(~image.crowd)
    return Marked(
        boxes=image.boxes[shown],
        labels=image.labels[shown].tolist(),
        scores=[None] * len(shown),
        segmentations=[image.segmentations[row] for row in shown],
    )


def marked_from_results(
    results: Sequence[Mapping[str, Any]], label_of: Mapping[int, int]
) -> Marked:
    """Return the detections of an image that are drawn.

    Args:
        results: of the image, as COCO's results files hold them.
        label_of: id of a category -> its label.
    """
    by_score = sorted(results, key=lambda result: -float(result["score"]))
    shown = by_score[:1] + [one for one in by_score[1:] if one["score"] >= SHOWN_SCORE]
    boxes = np.array([result["bbox"] for result in shown], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Marked(
        boxes=boxes,
        labels=[label_of[result["category_id"]] for result in shown],
        scores=[result["score"] for result in shown],
        segmentations=[result.get("segmentation") for result in shown],
    )


def detection_grid(
    images: Sequence[Image.Image],
    truth: Sequence[Marked],
    found: Sequence[Marked],
    classes: Sequence[str],
) -> bytes:
    """Return each image twice, with its true objects and with those found; one row per image.

    Args:
        images: RGB.
        truth, found: what is marked on them.
        classes: names, by label.
    """
    shapes = [min(_HIGHEST, image.height / image.width) for image in images]
    side = _WIDTH_IN / 2
    figure = Figure(figsize=(_WIDTH_IN, side * sum(shapes) + 0.8), layout="constrained")
    axes = figure.subplots(len(images), 2, squeeze=False, height_ratios=shapes)
    columns = {"truth": truth, f"found: score {SHOWN_SCORE:g} or above, or the best one": found}
    for column, (title, marked) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=11, color=_INK)
        for axis, image, of in zip(axes[:, column], images, marked, strict=True):
            _draw(axis, image, of, classes)
    labels = sorted({label for of in (*truth, *found) for label in of.labels})
    figure.legend(
        handles=[Patch(facecolor=_colour(label), label=classes[label]) for label in labels],
        loc="outside lower center",
        ncols=min(6, max(1, len(labels))),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _draw(axis: Axes, image: Image.Image, marked: Marked, classes: Sequence[str]) -> None:
    scale = min(1.0, _MOST_PX / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) / 255
    stored = image.height, image.width
    for label, segmentation in zip(marked.labels, marked.segmentations, strict=True):
        if segmentation is not None:
            inside = (
                bitmap_of(segmentation, from_size=stored, to_size=(height, width))[..., None] > 0
            )
            veiled = (1 - _VEIL) * pixels + _VEIL * np.array(to_rgb(_colour(label)))
            pixels = np.where(inside, veiled, pixels)
    axis.imshow(pixels, interpolation="nearest")
    for box, label, score in zip(marked.boxes * scale, marked.labels, marked.scores, strict=True):
        _draw_box(axis, box, classes[label], score, _colour(label))
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(height - 0.5, -0.5)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    if not len(marked.labels):
        axis.set_xlabel("nothing", fontsize=8, color=_FAINT)


def _draw_box(
    axis: Axes, box: NDArray[np.float64], name: str, score: float | None, colour: str
) -> None:
    left, top, right, bottom = box
    place = (left, top), right - left, bottom - top
    axis.add_patch(Rectangle(*place, fill=False, edgecolor="white", linewidth=2.6))
    axis.add_patch(Rectangle(*place, fill=False, edgecolor=colour, linewidth=1.6))
    axis.annotate(
        name if score is None else f"{name} {score:.2f}",
        (left, top),
        xytext=(3, -3),
        textcoords="offset points",
        ha="left",
        va="top",
        fontsize=8.5,
        color=_INK,
        path_effects=[patheffects.withStroke(linewidth=2.2, foreground="white")],
        annotation_clip=True,
        clip_on=True,
    )


def _colour(label: int) -> str:
    return _COLOURS[label % len(_COLOURS)]
