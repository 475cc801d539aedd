"""What a fine-tuning writes while it goes on: ``metrics.jsonl``, lines of progress, a curve."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from pcd_ray import storage
from pcd_ray.evaluate.drawing import BLUE, FAINT, GREEN, GRID, INK, ORANGE, PURPLE, png_of

_WRITE_EVERY_S = 30.0  # object stores cannot append: the file is written again this often
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, INK)
_SMOOTHED = 40  # parts that a curve is averaged over

Line = Mapping[str, float]
"""``step``, ``lr``, and each loss by name."""


class FinetuneLog:
    """Losses of a fine-tuning, on storage and on the driver's stderr."""

    def __init__(self, uri: str, steps: int) -> None:
        """Go on with the lines that lie at ``uri``, if any; ``steps`` in all."""
        self._uri = uri
        self._steps = steps
        self._first: tuple[int, float] | None = None  # step and time from which the rate counts
        self._written_s = time.monotonic()
        self.history = read_history(uri)

    def resumed(self, step: int) -> None:
        """Note from which step it starts; what was logged after it is done again."""
        self._first = (step, time.monotonic())
        self.history = [line for line in self.history if line["step"] <= step]
        self.say(f"fine-tuning from step {step} of {self._steps}")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record the losses and the rate of a step."""
        self.history.append({"step": step, **values})
        self.say(self._progress(step, values))
        if time.monotonic() - self._written_s > _WRITE_EVERY_S:
            self._written_s = time.monotonic()
            try:
                self.flush()
            except storage.StorageError as error:  # training goes on; the end writes all again
                self.say(f"warning: {error}")

    def say(self, text: str) -> None:
        """Print a line."""
        sys.stderr.write(f"{text}\n")  # stdout holds results alone

    def flush(self) -> None:
        """Write all lines."""
        storage.write_text(self._uri, "".join(f"{json.dumps(line)}\n" for line in self.history))

    def _progress(self, step: int, values: Mapping[str, float]) -> str:
        begun, since = self._first or (step, time.monotonic())
        done, elapsed_s = step - begun, time.monotonic() - since
        step_s = elapsed_s / done if done else 0.0
        losses = " ".join(f"{name} {value:.3f}" for name, value in values.items() if name != "lr")
        return (
            f"step {step}/{self._steps} | {step_s:.2f} s/step | "
            f"ETA {(self._steps - step) * step_s / 60:.1f} min | {losses} | "
            f"lr {values['lr']:.2g}"
        )


def read_history(uri: str) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``; none where it is absent or damaged."""
    if not storage.exists(uri):
        return []
    try:
        return [json.loads(line) for line in storage.read_text(uri).splitlines()]
    except (json.JSONDecodeError, storage.NotTextError):
        return []


def training_curve(history: Sequence[Line]) -> bytes:
    """Return a PNG of losses and learning rate by step.

    Args:
        history: at least one line, in the order of steps.
    """
    losses = [name for name in history[0] if name not in ("step", "lr")]
    figure = Figure(figsize=(10.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    steps = [line["step"] for line in history]
    for name, colour in zip(losses, _COLOURS * len(losses), strict=False):
        values = [line[name] for line in history]
        left.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        left.plot(steps, _smooth(values), color=colour, linewidth=1.8, label=name)
    right.plot(steps, [line["lr"] for line in history], color=BLUE, linewidth=1.8)
    for axis, title in ((left, "Losses of fine-tuning (nats)"), (right, "Learning rate")):
        axis.set_title(title, fontsize=10, color=INK, loc="left")
        axis.tick_params(labelsize=8, labelcolor=FAINT)
        axis.grid(color=GRID, linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("step", fontsize=8, color=FAINT)
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    return png_of(figure)


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the mean over the last fortieth of the lines at each of them."""
    width = max(1, len(values) // _SMOOTHED)
    return [
        sum(values[max(0, end - width) : end]) / min(end, width)
        for end in range(1, len(values) + 1)
    ]
