"""A confusion matrix as a picture.

Shapes: L classes.
"""

import io
from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

_MOST_NUMBERS = 24  # classes up to which cells hold their numbers
_INK = "#2b2f36"


def confusion_png(confusion: Tensor, classes: Sequence[str]) -> bytes:
    """Return a PNG of a confusion matrix, each true class's pixels in percent.

    Args:
        confusion: pixel counts (L, L): rows the true class, columns the predicted one.
        classes: names by label.
    """
    counts = confusion.double()
    truth = counts.sum(dim=1, keepdim=True)
    shares = (100 * counts / truth.clamp(min=1)).numpy()  # (L, L)
    size = 2.2 + 0.42 * len(classes)
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    places = range(len(classes))
    names = [
        name if bool(of) else f"{name} (none)" for name, of in zip(classes, truth, strict=True)
    ]
    axis.set_xticks(places, classes, rotation=90, fontsize=8, color=_INK)
    axis.set_yticks(places, names, fontsize=8, color=_INK)
    axis.set_xlabel("predicted", fontsize=9, color=_INK)
    axis.set_ylabel("true", fontsize=9, color=_INK)
    if len(classes) <= _MOST_NUMBERS:
        for row in places:
            for column in places:
                share = float(shares[row, column])
                if round(share):
                    colour = "white" if share > 55 else _INK
                    text = axis.text(column, row, f"{share:.0f}", fontsize=7, color=colour)
                    text.set(ha="center", va="center")
    bar = figure.colorbar(image, ax=axis, shrink=0.8)
    bar.set_label("% of the true class's pixels", fontsize=8, color=_INK)
    bar.ax.tick_params(labelsize=8, labelcolor=_INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
