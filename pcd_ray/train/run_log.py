"""What a run writes while it trains: ``metrics.jsonl``, TensorBoard events, one progress line."""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from pcd_ray import metric_names as names
from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder
from pcd_ray.train.metrics import warnings_of

_UPLOAD_EVERY_S = 30.0  # object stores cannot append: files are written again this often


class RunLog:
    """The metrics of a run, on storage and on the console.

    Lines after the step that a run resumes from are dropped, since these steps are done again.
    """

    def __init__(
        self, folder: RunFolder, *, total_steps: int, console: TextIO | None = None
    ) -> None:
        self._folder = folder
        self._total_steps = total_steps
        self._console = console or sys.stderr
        self._live = self._console.isatty()
        self._local = Path(tempfile.mkdtemp(prefix="pcd_ray_events_"))
        self._events = SummaryWriter(str(self._local))
        self._warned: set[str] = set()
        self._first: tuple[int, float] | None = None  # step and time of this sitting's first line
        self._last_upload_s = time.monotonic()
        self._lost_s: float | None = None  # since when there are no workers
        self.history = _read_history(folder)
        """Lines of metrics so far, one mapping each."""

    def resume_at(self, step: int) -> None:
        """Forget what was measured after a step, and say how long workers were gone."""
        if self._lost_s is not None:
            self.say(f"training again {time.monotonic() - self._lost_s:.0f} s after the loss")
            self._lost_s = None
        self._events.close()
        self._events = SummaryWriter(str(self._local), purge_step=step + 1)
        self.history = [line for line in self.history if line["step"] <= step]

    def metrics(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Record a line of metrics, warn in plain words, and show progress."""
        self.history.append({"step": step, "epoch": round(epoch, 4), **values})
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if names.LOSS in values:
            self._show(self._progress(step, epoch, values))
            for warning in warnings_of(values):
                kind = warning.partition("(")[0].partition(" is ")[0]
                if kind not in self._warned:  # once is enough: the numbers are in every line
                    self._warned.add(kind)
                    self.say(f"note: {warning}")
        if time.monotonic() - self._last_upload_s > _UPLOAD_EVERY_S:
            self.save()

    def lost(self, text: str) -> None:
        """Say, once, that workers were lost."""
        if self._lost_s is None:
            self._lost_s = time.monotonic()
            self.say(f"warning: {text}")

    def say(self, text: str) -> None:
        """Print a line of text, above the progress line if there is one."""
        start = "\r\x1b[K" if self._live else ""
        print(f"{start}{text}", file=self._console, flush=True)

    def save(self) -> None:
        """Write metrics and events, beside a checkpoint or now and then; a failure is said."""
        self._last_upload_s = time.monotonic()
        try:
            self._write()
        except storage.StorageError as error:  # training goes on, and `close` writes all again
            self.say(f"warning: {error}")

    def _write(self) -> None:
        self._events.flush()
        lines = [json.dumps(line) for line in self.history]
        storage.write_text(self._folder.file("metrics.jsonl"), "".join(f"{x}\n" for x in lines))
        for file in self._local.iterdir():
            storage.write_bytes(self._folder.file("tensorboard", file.name), file.read_bytes())

    def close(self) -> None:
        """Write everything and leave nothing behind.

        Raises:
            StorageError: the run's folder cannot be written.
        """
        if self._live:
            print(file=self._console)
        self._events.close()
        try:
            self._write()
        finally:
            shutil.rmtree(self._local, ignore_errors=True)

    def _progress(self, step: int, epoch: float, values: Mapping[str, float]) -> str:
        left_s = (self._total_steps - step) * self._step_s(step, values)
        quality = next(
            (
                f"kNN {line[names.KNN_TOP1]:.1f}%"
                for line in reversed(self.history)
                if names.KNN_TOP1 in line
            ),
            f"pixel top-1 {values[names.PIXEL_TOP1]:.1f}%",
        )
        at_teacher = values[names.LOSS_AT_TEACHER]
        loss = at_teacher + values[names.LOSS_ABOVE_TEACHER]  # of one step: train/loss is a mean
        return (
            f"step {step}/{self._total_steps} epoch {epoch:.2f} | ETA {_duration(left_s)} | "
            f"{values[names.IMAGES_PER_S]:.1f} images/s | "
            f"data wait {values[names.DATA_WAIT]:.0f}% | "
            f"loss {loss:.3f} ({at_teacher:.3f} at student = teacher) | "
            f"{quality}"
        )

    def _step_s(self, step: int, values: Mapping[str, float]) -> float:
        """Return the time per step of this sitting, evaluations and checkpoints included."""
        now = time.monotonic()
        if self._first is None or self._first[0] >= step:
            self._first = (step, now)
            return values[names.STEP_S]
        return (now - self._first[1]) / (step - self._first[0])

    def _show(self, line: str) -> None:
        if self._live:
            print(f"\r\x1b[K{line}", end="", file=self._console, flush=True)
        else:
            print(line, file=self._console, flush=True)


def _read_history(folder: RunFolder) -> list[dict[str, Any]]:
    uri = folder.file("metrics.jsonl")
    if not storage.exists(uri):
        return []
    history = []
    for line in storage.read_text(uri).splitlines():
        try:
            history.append(json.loads(line))
        except json.JSONDecodeError:  # a line that a killed writer left unfinished
            continue
    return history


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
