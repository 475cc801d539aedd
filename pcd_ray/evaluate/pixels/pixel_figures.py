"""Pictures of one pixel, each as PNG bytes: what resembles it, attends to it, moves it.

Shapes: B images of H x W pixels, h x w map positions.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from pcd_ray.evaluate.drawing import (
    FAINT,
    INK,
    ORANGE,
    WIDTH_IN,
    Pixels,
    bare,
    image_table,
    png_of,
    show,
)
from pcd_ray.evaluate.pixels.pixel_relations import Place, position_of
from pcd_ray.evaluate.pixels.receptive_field import area_50_square

_COLOURS = colormaps["viridis"]
_HEADS_PER_ROW = 8
_FIELDS_PER_ROW = 4


def similarity_figure(
    images: Pixels | Tensor, maps: Mapping[str, Tensor], pixels: Sequence[Place | None]
) -> bytes:
    """Return each image beside its similarity maps, one column and one scale for each network.

    Args:
        images: (B, H, W, 3).
        maps: network's name -> cosines (B, h, w).
        pixels: (x, y) that the maps of each image are about; None: a pixel of another image.
    """
    size = images.shape[1], images.shape[2]
    scales = {name: Normalize(float(of.min()), float(of.max())) for name, of in maps.items()}
    columns: dict[str, Sequence[NDArray[Any]]] = {"image": list(np.asarray(images))}
    for name, of in maps.items():
        title = f"{name}\n{of.shape[1]} x {of.shape[2]} positions"
        columns[title] = [_COLOURS(scales[name](np.asarray(each)))[..., :3] for each in of]
    figure = image_table(columns, aspect=size[0] / size[1])
    axes = np.array(figure.axes).reshape(len(images), len(columns))
    for row, pixel in enumerate(pixels):
        if pixel is not None:
            _mark_pixel(axes[row, 0], pixel)
            for axis, of in zip(axes[row, 1:], maps.values(), strict=True):
                _mark_cell(axis, pixel, size, of)
    for column, scale in enumerate([None, *scales.values()]):
        _draw_bar(figure, axes[:, column], scale)
    return png_of(figure)


def attention_figure(
    images: Pixels | Tensor, attention: Sequence[Tensor], pixels: Sequence[Place]
) -> bytes:
    """Return each image beside the attention of a pixel, head by head, a row for each layer.

    Each head has its own scale from zero; its largest weight stands below it, as a multiple of
    the even share that each position would get if all got the same.

    Args:
        images: (B, H, W, 3).
        attention: weights (layers, heads, h, w) for each image.
        pixels: (x, y) in each image, which attends.
    """
    layers, heads, height, width = attention[0].shape
    per_row = min(heads, _HEADS_PER_ROW)
    blocks = -(-heads // per_row)
    rows = len(images) * layers * blocks
    side = WIDTH_IN / (per_row + 1)
    size = images.shape[1], images.shape[2]
    aspect = size[0] / size[1]
    figure = Figure(figsize=(WIDTH_IN, rows * (side * aspect + 0.19) + 0.3), layout="constrained")
    axes = figure.subplots(rows, per_row + 1, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for index, (image, pixel) in enumerate(zip(np.asarray(images), pixels, strict=True)):
        for layer, head in itertools.product(range(layers), range(heads)):
            row = (index * layers + layer) * blocks + head // per_row
            axis = axes[row, 1 + head % per_row]
            weights = attention[index][layer, head]
            _draw_head(axis, weights, aspect=aspect * width / height)
            _mark_cell(axis, pixel, size, weights[None])
            words = f"layer {layer + 1}, head {head + 1}" if layers > 1 else f"head {head + 1}"
            axis.set_title(words, fontsize=7, color=INK, pad=3)
        axis = axes[index * layers * blocks, 0]
        axis.set_visible(True)
        show(axis, image)
        _mark_pixel(axis, pixel)
    return png_of(figure)


def receptive_field_figure(fields: Mapping[str, Tensor]) -> bytes:
    """Return effective receptive fields side by side, with the square that holds half of each.

    Args:
        fields: name -> shares (H, W) of the pixels (see `effective_receptive_field`).
    """
    columns = min(len(fields), _FIELDS_PER_ROW)
    rows = -(-len(fields) // columns)
    side = min(WIDTH_IN / columns, 3.4)
    height, width = next(iter(fields.values())).shape
    size = side * columns, (side * height / width + 0.35) * rows
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, field) in zip(axes, fields.items(), strict=False):
        _draw_field(axis, np.asarray(field))
        square, top, left = area_50_square(field)
        axis.add_patch(
            Rectangle((left - 0.5, top - 0.5), square, square, fill=False, color=ORANGE, lw=1.8)
        )
        axis.set_title(name, fontsize=10, color=INK)
        words = f"half within {square} x {square} px\n= {square**2:,} px of {field.numel():,}"
        axis.set_xlabel(words if field.any() else "no pixel moves it", fontsize=9, color=INK)
    for axis in axes[len(fields) :]:
        axis.set_visible(False)
    return png_of(figure)


def _draw_head(axis: Axes, weights: Tensor, *, aspect: float) -> None:
    grid = np.asarray(weights)
    axis.set_visible(True)
    axis.imshow(grid, cmap=_COLOURS, vmin=0, interpolation="nearest", aspect=aspect)
    bare(axis)
    axis.set_xlabel(f"max {grid.max() * grid.size:.1f} x even", fontsize=7, color=FAINT, labelpad=2)


def _draw_field(axis: Axes, field: NDArray[np.float64]) -> None:
    """Draw shares of pixels; the root brings out the weak ones, which are many."""
    height, width = field.shape
    bright = float(np.quantile(field, 0.999)) or float(field.max()) or 1.0
    axis.imshow(field, cmap=_COLOURS, norm=PowerNorm(0.5, 0, bright), interpolation="antialiased")
    axis.set_xticks([0, width // 2, width], ["0", f"{width // 2}", f"{width} px"])
    axis.set_yticks([0, height // 2, height])
    axis.tick_params(labelsize=7, colors=FAINT, length=2)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _mark_pixel(axis: Axes, pixel: Place) -> None:
    """Draw a ring with a point around a pixel, light and dark, to be seen on any photograph."""
    x, y = pixel[0] - 0.5, pixel[1] - 0.5  # pixels lie around whole numbers here
    for color, width in (("white", 3.0), (ORANGE, 1.5)):
        axis.plot(x, y, "o", markersize=9, fillstyle="none", color=color, markeredgewidth=width)
    axis.plot(x, y, ".", markersize=3, color=ORANGE)


def _mark_cell(axis: Axes, pixel: Place, size: tuple[int, int], of: Tensor) -> None:
    """Frame the position of maps (B, h, w) that a pixel of an image (H, W) lies in."""
    row, column = position_of(pixel, size, (of.shape[1], of.shape[2]))
    for color, width in (("white", 2.4), (ORANGE, 1.2)):
        axis.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, color=color, lw=width)
        )


def _draw_bar(figure: Figure, axes: NDArray[Any], scale: Normalize | None) -> None:
    """Draw a scale of cosines below a column; without one, leave its room empty."""
    bar = figure.colorbar(
        ScalarMappable(scale, _COLOURS),
        ax=list(axes),
        location="bottom",
        fraction=0.03,
        pad=0.01,
        shrink=0.85,
    )
    bar.set_label("cosine", fontsize=8, color=FAINT)
    bar.ax.tick_params(labelsize=7, colors=FAINT, length=2)
    bar.ax.locator_params(nbins=4)
    bar.outline.set_visible(False)
    bar.ax.set_visible(scale is not None)
