"""What all pictures share: paper, ink, colours, axes without ticks, tables of images, PNG bytes.

Colours are safe for colour-blind readers (Okabe and Ito; Tol's muted set for classes).
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]
Pictures = Sequence[Pixels] | Tensor | Pixels
"""Pictures or masks of equal or different sizes, one after another."""

WIDTH_IN = 10.0
_DPI = 150
INK, FAINT, GRID = "#2b2f36", "#6b7280", "#e5e7eb"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
# fmt: off
_MUTED = (
    "#88ccee", "#cc6677", "#ddcc77", "#332288", "#44aa99", "#117733",
    "#aa4499", "#999933", "#882255", "#e69f00", "#0072b2", "#661100",
)
# fmt: on
_VOID_COLOUR = "#e8e8e8"


def show(axis: Axes, pixels: NDArray[Any]) -> None:
    """Draw colours (H, W, 3) so that each pixel shows, without ticks and frame."""
    axis.imshow(pixels, interpolation="nearest")
    bare(axis)


def bare(axis: Axes) -> None:
    """Take ticks and frame off."""
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def image_table(columns: Mapping[str, Sequence[NDArray[Any]]], *, aspect: float) -> Figure:
    """Return a figure with titled columns of pictures, all drawn ``aspect`` as high as wide."""
    rows = len(next(iter(columns.values())))
    side = WIDTH_IN / len(columns)
    figure = Figure(figsize=(WIDTH_IN, rows * side * aspect + 0.6), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(name, fontsize=10 if len(columns) <= 5 else 7, color=INK)
        for axis, pixels in zip(axes[:, column], pictures, strict=True):
            show(axis, pixels)
            axis.set_aspect(aspect * pixels.shape[1] / pixels.shape[0])
    return figure


def class_palette(num_classes: int) -> Pixels:
    """Return a colour for each label, (256, 3) uint8; labels that are no class look void."""
    turns = np.arange(max(0, num_classes - len(_MUTED))) * 0.618  # the golden ratio spreads hues
    extra = hsv_to_rgb(
        np.stack([turns % 1, 0.45 + 0.3 * (turns % 0.7), 0.9 - 0.5 * (turns % 0.9)], 1)
    )
    known = [to_rgb(color) for color in _MUTED[:num_classes]]
    palette = np.full((256, 3), to_rgb(_VOID_COLOUR))
    palette[:num_classes] = np.concatenate([np.array(known).reshape(-1, 3), extra])
    return np.round(255 * palette).astype(np.uint8)


def png_of(figure: Figure) -> bytes:
    """Return a figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
