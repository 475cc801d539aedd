"""Pictures of a run, each as PNG bytes: curves, views, principal-component maps, masks.

Shapes: B images, H x W pixels, C channels, h x w map positions.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from torch import Tensor

from pcd_ray import metric_names as names
from pcd_ray.evaluate.drawing import (
    BLUE,
    FAINT,
    GREEN,
    GRID,
    INK,
    ORANGE,
    PURPLE,
    WIDTH_IN,
    Pictures,
    Pixels,
    bare,
    class_palette,
    image_table,
    png_of,
    show,
)


@dataclass(frozen=True, slots=True)
class _Panel:
    key: str
    title: str
    unit: str = ""


_PANELS = (
    _Panel(names.POSITIVE_COSINE, "Positive cosine"),
    _Panel(names.QUEUE_TOP1, "Image retrieval top-1", "%"),
    _Panel(names.PIXEL_TOP1, "Pixel retrieval top-1", "%"),
    _Panel(names.EFFECTIVE_RANK, "Effective rank"),
    _Panel(names.KNN_TOP1, "kNN top-1", "%"),
    _Panel(names.LEARNING_RATE, "Learning rate"),
)


def loss_curve(
    history: Sequence[Mapping[str, float]],
    *,
    knn_references: Mapping[str, float] | None = None,
    loss_unit: str = "nats",
) -> bytes:
    """Return small multiples of what was logged while training.

    Args:
        history: lines of metrics, each with ``step`` and some of the known names; a step that
            was logged twice (after a resume) counts as logged last.
        knn_references: name -> kNN top-1 in percent, drawn as level lines, e.g. of the teacher.
        loss_unit: what the loss is counted in; empty for a squared distance.

    Raises:
        ValueError: no line has a metric that is drawn.
    """
    known = (_Panel(names.LOSS, "Loss", loss_unit), *_PANELS)
    panels = [panel for panel in known if len(_points(history, panel.key))]
    if not panels:
        raise ValueError(f"the {len(history)} lines of metrics have none of those that are drawn")
    columns = min(len(panels), 4 if len(panels) in (4, 7, 8) else 3)
    rows = -(-len(panels) // columns)
    width = WIDTH_IN * min(1, columns / 3)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06)
    figure = Figure(figsize=(width, (1.3 + 3 / max(columns, 3)) * rows), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, history)
        if panel.key == names.KNN_TOP1:
            _draw_references(axis, knn_references or {})
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("step", fontsize=8, color=FAINT)
    return png_of(figure)


def views_grid(
    student_views: Pixels | Tensor,
    teacher_views: Pixels | Tensor | None,
    student_boxes: NDArray[np.float32] | Tensor,
    teacher_boxes: NDArray[np.float32] | Tensor,
) -> bytes:
    """Return the views as the networks see them, one column per image.

    Args:
        student_views: (B, H, W, 3).
        teacher_views: (B, H, W, 3); None where the student's view serves both.
        student_boxes: (B, 5) left, top, width, height in pixels of the image, and flip.
        teacher_boxes: (B, 5); drawn over the student's in a last row where there are two views.
    """
    two = teacher_views is not None
    rows, columns = (3 if two else 1), len(student_views)
    side = WIDTH_IN / columns
    figure = Figure(figsize=(WIDTH_IN, side * rows + 0.25), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    views = {"student" if two else "both networks": student_views}
    if teacher_views is not None:
        views["teacher"] = teacher_views
    for row, (name, pixels) in enumerate(views.items()):
        boxes = teacher_boxes if name == "teacher" else student_boxes
        for column, box in enumerate(np.asarray(boxes)):
            show(axes[row, column], np.asarray(pixels[column]))
            axes[row, column].set_xlabel(_box_words(box), fontsize=7, color=FAINT)
        axes[row, 0].set_ylabel(name, fontsize=10, color=INK)
    if two:
        boxes_of_both = (np.asarray(student_boxes), np.asarray(teacher_boxes))
        for axis, first, second in zip(axes[2], *boxes_of_both, strict=True):
            _draw_boxes(axis, {BLUE: first, ORANGE: second})
        axes[2, 0].set_ylabel("crops", fontsize=10, color=INK)
        handles = [Patch(color=BLUE, label="student"), Patch(color=ORANGE, label="teacher")]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return png_of(figure)


def pca_maps(images: Pixels | Tensor, maps: Mapping[str, Tensor]) -> bytes:
    """Return each image beside its maps in colour, nearest-upsampled so that positions show.

    Args:
        images: (B, H, W, 3).
        maps: network's name -> its maps (B, C, h, w); see `pca_colours`.
    """
    columns: dict[str, Sequence[NDArray[Any]]] = {"image": list(np.asarray(images))}
    for name, features in maps.items():
        grid = f"{features.shape[2]} x {features.shape[3]} positions"
        columns[f"{name}\n{grid}"] = list(pca_colours(features))
    return png_of(image_table(columns, aspect=images.shape[1] / images.shape[2]))


def pca_colours(features: Tensor) -> NDArray[np.float32]:
    """Return maps (B, C, h, w) as colours (B, h, w, 3) in [0, 1].

    Red, green and blue are the first three principal components over all positions of all images.
    A component's largest loading is positive; each is scaled from its 2nd to its 98th
    percentile. Components without variance are mid-grey.
    """
    rows = features.detach().double().cpu().permute(0, 2, 3, 1).flatten(0, 2)  # (Bhw, C)
    _, strengths, axes = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    axes = axes[:3]  # (up to 3, C)
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    parts = (rows - rows.mean(dim=0)) @ (axes * largest.sign()).T  # (Bhw, up to 3)
    low, high = (torch.quantile(parts, q, dim=0) for q in (0.02, 0.98))
    present = (strengths[:3] > 1e-6 * rows.norm()) & (high > low)
    scaled = torch.full((len(rows), 3), 0.5, dtype=torch.float64)
    scaled[:, : len(axes)][:, present] = ((parts - low) / (high - low)).clamp(0, 1)[:, present]
    batch, _, height, width = features.shape
    return scaled.view(batch, height, width, 3).float().numpy()


def segmentation_grid(
    images: Pictures,
    truth: Pictures,
    predictions: Mapping[str, Pictures],
    classes: Sequence[str],
) -> bytes:
    """Return each image beside its true and its predicted masks, with a legend.

    Args:
        images: (H, W, 3) each.
        truth: masks (Y, X) each; labels beyond ``classes`` are void.
        predictions: network's name -> masks (Y, X), one per image.
        classes: names by label.
    """
    palette = class_palette(len(classes))  # (256, 3)
    masks = {"truth": _arrays(truth)} | {name: _arrays(of) for name, of in predictions.items()}
    columns: dict[str, Sequence[NDArray[Any]]] = {"image": _arrays(images)}
    columns |= {name: [palette[mask] for mask in of] for name, of in masks.items()}
    figure = image_table(columns, aspect=images[0].shape[0] / images[0].shape[1])
    shown = np.unique(np.concatenate([np.unique(mask) for of in masks.values() for mask in of]))
    handles = [
        Patch(
            facecolor=palette[label] / 255, label=classes[label] if label < len(classes) else "void"
        )
        for label in [*shown[shown < len(classes)], *shown[shown >= len(classes)][:1]]
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(6, len(handles)),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    return png_of(figure)


def _arrays(pictures: Pictures) -> list[Pixels]:
    return [np.asarray(picture) for picture in pictures]


def _points(history: Sequence[Mapping[str, float]], key: str) -> NDArray[np.float64]:
    """Return (steps, 2): the step and the value of a metric, each step once, in order."""
    points = {line["step"]: line[key] for line in history if line.get(key) is not None}
    return np.array(sorted(points.items()), np.float64).reshape(-1, 2)


def _draw_panel(axis: Axes, panel: _Panel, history: Sequence[Mapping[str, float]]) -> None:
    logged = _points(history, panel.key)
    marker = "o" if len(logged) <= 20 else ""
    axis.plot(*logged.T, color=BLUE, linewidth=0.7, alpha=0.3)
    axis.plot(*_smooth(logged).T, color=BLUE, linewidth=1.8, marker=marker, markersize=3.5)
    if panel.key == names.LOSS:
        at_teacher = _points(history, names.LOSS_AT_TEACHER)
        if len(at_teacher):
            line = _smooth(at_teacher)
            axis.plot(*line.T, color=FAINT, linewidth=1.2)
            if len(line) == 1:  # one point is no line
                axis.axhline(line[0, 1], color=FAINT, linewidth=1.2)
            _name_line(axis, "student = teacher", float(line[-1, 1]), color=FAINT)
    _dress(axis, f"{panel.title} ({panel.unit})" if panel.unit else panel.title)


def _draw_references(axis: Axes, references: Mapping[str, float]) -> None:
    colors = itertools.cycle((FAINT, ORANGE, GREEN, PURPLE))  # as the cards of a report
    for (name, value), color in zip(references.items(), colors, strict=False):
        axis.axhline(value, color=color, linewidth=1.2, linestyle="--")
        _name_line(axis, f"{name} {value:.1f}", value, color=color)
    axis.margins(y=0.18)


def _name_line(axis: Axes, text: str, height: float, *, color: str) -> None:
    """Write a level line's name just above its right end."""
    axis.annotate(
        text,
        (1, height),
        xycoords=axis.get_yaxis_transform(),
        xytext=(-2, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
        color=color,
    )


def _smooth(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the moving mean of (steps, 2) over a fortieth of them; few points stay as they are."""
    window = max(1, len(points) // 40)
    kernel = np.ones(window) / window
    return np.stack([np.convolve(column, kernel, mode="valid") for column in points.T], axis=1)


def _dress(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.tick_params(labelsize=8, colors=FAINT, length=0, labelbottom=True)
    axis.locator_params(axis="x", nbins=4, integer=True)  # steps are whole
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def _box_words(box: NDArray[np.float32]) -> str:
    left, top, width, height, flip = (round(float(value)) for value in box)
    return f"{width} x {height} px\nat {left}, {top}" + (", flipped" if flip else "")


def _draw_boxes(axis: Axes, boxes: Mapping[str, NDArray[np.float32]]) -> None:
    for color, (left, top, width, height, _) in boxes.items():
        place = (left, top), width, height
        axis.add_patch(Rectangle(*place, facecolor=color, alpha=0.15))
        axis.add_patch(Rectangle(*place, fill=False, edgecolor=color, linewidth=1.5))
    axis.autoscale_view()
    axis.invert_yaxis()
    axis.set_aspect("equal")
    bare(axis)
