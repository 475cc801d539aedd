"""What a sweep leaves behind as plain files: ``trials.csv`` and ``best.yaml``."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from pcd_ray.config import Config, TuneConfig, to_yaml
from pcd_ray.tune.space import trial_config
from pcd_ray.tune.study import ADDED, COST, OVER, REASON, OpenStudy, history_of

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
"""Optuna's states in our words."""


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One trial, as tables show it."""

    number: int
    state: str
    score: float | None
    """In percent; of a trial that was not finished the last one it had."""
    cost: float | None
    epochs: int
    """Epochs after which that score was taken."""
    values: Mapping[str, Any]
    """Options that it varies -> values."""
    reason: str
    """Why it failed."""

    @property
    def over(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.state in {STATES[state] for state in OVER}

    def row(self) -> dict[str, Any]:
        """Return its line of ``trials.csv``."""
        return {
            "trial": self.number,
            "state": self.state,
            "score": self.score,
            "cost": self.cost,
            "epochs": self.epochs,
            **self.values,
            "reason": self.reason,
        }


def trial_name(number: int) -> str:
    """Return the name of a trial's run; names sort as numbers do."""
    return f"trial_{number:04d}"


def records_of(opened: OpenStudy) -> list[TrialRecord]:
    """Return all trials that have begun, by number."""
    return [_record(trial) for trial in opened.trials() if trial.state != TrialState.WAITING]


def best_trial(opened: OpenStudy) -> FrozenTrial | None:
    """Return the finished trial with the highest score; None: none has finished."""
    finished = opened.trials(TrialState.COMPLETE)
    return max(finished, key=lambda trial: trial.values[0], default=None)


def trade_offs(opened: OpenStudy) -> list[int]:
    """Return the numbers of the trials that no other beats in score and in cost."""
    return [trial.number for trial in opened.study.best_trials]


def trials_csv(records: Sequence[TrialRecord]) -> str:
    """Return ``trials.csv``; options that a trial did not have are empty."""
    rows = [record.row() for record in records]
    names = dict.fromkeys(name for row in rows for name in row)
    ordered = [name for name in names if name != "reason"] + ["reason"] * ("reason" in names)
    text = io.StringIO()
    writer = csv.DictWriter(text, ordered, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def best_config(config: Config, trial: FrozenTrial) -> Config:
    """Return the configuration of a trial as a run of its own, ready for ``pcd-ray train``."""
    best = trial_config(config, trial_values(trial))
    run = replace(config.run, name=f"{config.run.name}_best")
    return replace(best, run=run, tune=TuneConfig())


def best_yaml(config: Config, trial: FrozenTrial, *, unit: str) -> str:
    """Return ``best.yaml``: all options of the best trial, with a header that says whose they are.

    Args:
        config: the sweep.
        trial: its best trial.
        unit: what the score is.
    """
    values = "\n".join(f"#   {name}: {value}" for name, value in trial_values(trial).items())
    spent = trial.user_attrs.get(COST)
    cost = "" if spent is None or config.tune.cost == "none" else f"; {config.tune.cost} {spent:g}"
    return (
        f"# The best trial of the sweep {config.run.name}: trial {trial.number}.\n"
        "# Run:    pcd-ray train best.yaml\n"
        "# Cost:   see training_s in the trial's own summary.json\n"
        f"# Expect: {unit} {trial.values[0]:.1f} as the sweep measured it{cost}. It was chosen by\n"
        "#         this score: on images that chose nothing it will be lower.\n"
        f"# Searched options:\n{values}\n{to_yaml(best_config(config, trial))}"
    )


def trial_values(trial: FrozenTrial) -> dict[str, Any]:
    """Return all options that a trial varies: those it was asked for and those added to them."""
    return {**trial.params, **trial.user_attrs.get(ADDED, {})}


def score_of(trial: FrozenTrial) -> float | None:
    """Return a trial's score, of one that was not finished the last one it had; None: it had none.

    In percent.
    """
    if trial.state == TrialState.COMPLETE:
        return float(trial.values[0])
    history = history_of(trial)
    return history[max(history)] if history else None


def _record(trial: FrozenTrial) -> TrialRecord:
    return TrialRecord(
        number=trial.number,
        state=STATES[trial.state],
        score=score_of(trial),
        cost=trial.user_attrs.get(COST),
        epochs=max(history_of(trial), default=0),
        values=trial_values(trial),
        reason=trial.user_attrs.get(REASON, ""),
    )
