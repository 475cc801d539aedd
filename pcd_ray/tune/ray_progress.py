"""What a sweep says while it runs: a line per score, the table when a trial ends."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from ray import tune

from pcd_ray.config import Config
from pcd_ray.ray_cluster import free_reservation
from pcd_ray.tune.ray_search import EPOCH, FINISHED, NUMBER, RESERVATION, SCORE, VALUES
from pcd_ray.tune.records import TrialRecord, records_of
from pcd_ray.tune.space import Space, epochs_of
from pcd_ray.tune.study import OVER, OpenStudy


class Progress(tune.Callback):
    """Tells the console how trials go, and has the sweep's files written as each one ends."""

    def __init__(
        self,
        config: Config,
        opened: OpenStudy,
        write: Callable[[], object],
        console: TextIO | None = None,
    ) -> None:
        self._config = config
        self._opened = opened
        self._write = write
        self._console = console or sys.stderr
        self._ended: list[str] = []  # what trials held that are over, until it is free

    def begin(self, space: Space, *, at_a_time: int, left: int, notes: Sequence[str]) -> None:
        """Say what is going to happen."""
        over = len(self._opened.trials(*OVER))
        going_on = f"; {over} of {over + left} trials are over, {left} to go" if over else ""
        self._say(f"sweep {self._config.run.name}: {left} trials, {at_a_time} at a time{going_on}")
        for name, words in space.example().items():
            self._say(f"  {name}: {words}")
        for note in notes:
            self._say(note)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Free what stopped trials held, as soon as their processes are gone."""
        del iteration, trials, info
        self._ended = [held for held in self._ended if not free_reservation(held)]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say which values it has."""
        del iteration, trials, info
        self._say(f"trial {trial.config[NUMBER]}: {in_words(trial.config[VALUES])}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Say its score."""
        del iteration, trials, info
        epochs = epochs_of(trial.config[VALUES], self._config)
        when = "judged" if result.get(FINISHED) else f"epoch {result[EPOCH]} of {epochs}"
        score = f"{self._config.tune.metric} {result[SCORE]:.1f}"
        self._say(f"trial {trial.config[NUMBER]}: {when} {score}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Show the table and write the files."""
        del iteration, trials, info
        self._ended.append((trial.last_result or {}).get(RESERVATION, ""))
        self._show()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say why, show the table and write the files."""
        del iteration, trials, info
        self._ended.append((trial.last_result or {}).get(RESERVATION, ""))
        number = trial.config[NUMBER]
        reason = next(r.reason for r in records_of(self._opened) if r.number == number)
        self._say(f"trial {number} failed: {reason}")
        self._show()

    def _show(self) -> None:
        self._say(table_of(records_of(self._opened)))
        try:
            self._write()
        except Exception as error:  # whatever its cause, other trials go on
            reason = str(error).strip() or type(error).__name__
            self._say(f"warning: the sweep's files could not be written ({reason}); trials go on")

    def _say(self, text: str) -> None:
        print(text, file=self._console, flush=True)


def table_of(records: Sequence[TrialRecord]) -> str:
    """Return the trials as an aligned table, the best score first."""
    options = dict.fromkeys(name for record in records for name in record.values)
    lines = [["trial", "state", "score", "cost", "epochs", *options]]
    for record in sorted(records, key=lambda r: -(r.score or 0.0)):
        values = [_short(record.values.get(name, "-")) for name in options]
        score = "-" if record.score is None else f"{record.score:.1f}"
        cost = "-" if record.cost is None else f"{record.cost:g}"
        lines.append([str(record.number), record.state, score, cost, str(record.epochs), *values])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ("  ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(padded)


def in_words(values: dict[str, Any]) -> str:
    """Return options and values in a line."""
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
