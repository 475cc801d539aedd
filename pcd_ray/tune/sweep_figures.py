"""Pictures of a sweep, as PNG; parallel coordinates are Optuna's own plot."""

import io
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import optuna
import optuna.visualization.matplotlib as plots
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState, create_trial

from pcd_ray.tune.records import STATES, score_of
from pcd_ray.tune.study import history_of

_DPI = 130
_ENOUGH = 10  # finished trials, so that there is a best tenth
_STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
_MARKS = {
    "finished": ("#0072b2", True),
    "stopped early": ("#d55e00", False),
    "failed": ("#9aa3af", False),
}
"""State -> colour, and whether its mark is filled."""


def sweep_figures(study: optuna.Study, *, score: str, cost: str) -> dict[str, bytes]:
    """Return file name -> PNG of all pictures that the study has enough trials for.

    Args:
        study: with one direction or two.
        score: what the first value is, for axes.
        cost: what the second value is; empty: there is none.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if STATES[trial.state] in _MARKS]
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    drawn: dict[str, bytes | None] = {}
    if any(map(history_of, trials)):
        drawn["learning_curves.png"] = _learning_curves(trials, score)
    if len(finished) > 1:
        varied = _varied(finished)
        drawn["history.png"] = _history(trials, score)
        drawn["slices.png"] = _slices(trials, varied, score)
        scored = _of_scores_alone(finished)
        drawn["importance.png"] = _importance(scored)
        if len(varied) > 1:
            drawn["parallel.png"] = _parallel(scored, varied, score)
    if cost and len(finished) > 1:
        drawn["trade_off.png"] = _trade_off(study, finished, score, cost)
    return {name: png for name, png in drawn.items() if png}


def importances(scored: optuna.Study) -> dict[str, float]:
    """Return each option's share in what separates the best tenth of trials from the others.

    Empty where fewer than ten trials have finished or all are alike. Source: PED-ANOVA (Watanabe et
    al., IJCAI 2023), as Optuna has it.
    """
    if len(scored.trials) < _ENOUGH:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # no trial is better than the others
            found = get_param_importances(scored, evaluator=PedAnovaImportanceEvaluator())
    except (ValueError, RuntimeError, ZeroDivisionError, UserWarning):
        return {}
    return {name: float(share) for name, share in found.items() if share == share}


def _of_scores_alone(finished: Sequence[FrozenTrial]) -> optuna.Study:
    """Return a study in memory of the finished trials' scores: plots know that more is better."""
    study = optuna.create_study(direction="maximize")
    for trial in finished:
        study.add_trial(
            create_trial(
                value=trial.values[0], params=trial.params, distributions=trial.distributions
            )
        )
    return study


def _varied(trials: Sequence[FrozenTrial]) -> list[str]:
    """Return the options that all of these trials were asked for and that differ among them."""
    shared = set.intersection(*(set(trial.params) for trial in trials))
    names = [name for name in trials[0].params if name in shared]
    return [n for n in names if len({repr(trial.params[n]) for trial in trials}) > 1] or names


def _parallel(scored: optuna.Study, names: Sequence[str], score: str) -> bytes:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # our versions are pinned
        axes = plots.plot_parallel_coordinate(scored, params=list(names), target_name=score)
        axes.set_title("")
        return _png(axes.figure)


def _importance(scored: optuna.Study) -> bytes | None:
    shares = importances(scored)
    if not shares:
        return None
    figure, (axes,) = _panels(1, width=8.0)
    figure.set_figheight(0.5 * len(shares) + 1.2)
    names = list(shares)[::-1]
    axes.barh(names, [shares[name] for name in names], color=_MARKS["finished"][0])
    axes.set_xlabel(f"share in what separates the best of {len(scored.trials)} finished trials")
    return _png(figure)


def _trade_off(
    study: optuna.Study, finished: Sequence[FrozenTrial], score: str, cost: str
) -> bytes:
    """Draw score against cost, and the trials that no other beats in both as a line."""
    figure, (axes,) = _panels(1, width=8.0)
    for trial in finished:
        axes.scatter(trial.values[1], trial.values[0], s=28, color=_MARKS["finished"][0])
        place = (trial.values[1], trial.values[0])
        axes.annotate(str(trial.number), place, xytext=(5, -3), textcoords="offset points")
    front = sorted((trial.values[1], trial.values[0]) for trial in study.best_trials)
    costs, scores = zip(*front, strict=True)
    axes.step(costs, scores, where="post", color="#1c2026", linewidth=1, label="the front")
    axes.set_xlabel(cost)
    axes.set_ylabel(score)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _learning_curves(trials: Sequence[FrozenTrial], score: str) -> bytes:
    figure, (axes,) = _panels(1, width=8.0)
    for trial in trials:
        points = sorted(history_of(trial).items())
        if not points:
            continue
        colour, _ = _MARKS[STATES[trial.state]]
        epochs, scores = zip(*points, strict=True)
        axes.plot(epochs, scores, "o-", color=colour, alpha=0.7, markersize=3)
        axes.annotate(str(trial.number), points[-1], xytext=(4, -3), textcoords="offset points")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel(score)
    _legend(axes)
    return _png(figure)


def _history(trials: Sequence[FrozenTrial], score: str) -> bytes:
    figure, (axes,) = _panels(1, width=8.0)
    _scatter(axes, trials, [trial.number for trial in trials])
    best, so_far = [], float("-inf")
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            so_far = max(so_far, trial.values[0])
        best.append(so_far if so_far > float("-inf") else float("nan"))
    numbers = [trial.number for trial in trials]
    axes.step(numbers, best, where="post", color="#1c2026", linewidth=1, label="best so far")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial")
    axes.set_ylabel(score)
    _legend(axes)
    return _png(figure)


def _slices(trials: Sequence[FrozenTrial], names: Sequence[str], score: str) -> bytes:
    """Draw each option alone against the score, side by side on one scale."""
    figure, all_axes = _panels(len(names), width=3.0)
    for name, axes in zip(names, all_axes, strict=True):
        asked = [trial for trial in trials if name in trial.params]
        distribution = asked[0].distributions[name]
        if isinstance(distribution, CategoricalDistribution):
            places = [distribution.choices.index(trial.params[name]) for trial in asked]
            axes.set_xticks(range(len(distribution.choices)), map(str, distribution.choices))
            axes.set_xlim(-0.5, len(distribution.choices) - 0.5)
        else:
            places = [trial.params[name] for trial in asked]
            if getattr(distribution, "log", False):
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
        _scatter(axes, asked, places)
        axes.set_xlabel(name)
    all_axes[0].set_ylabel(score)
    _legend(all_axes[-1])
    return _png(figure)


def _panels(count: int, *, width: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels side by side that share their vertical axis."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width * count, 4.0), layout="constrained")
        return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _scatter(axes: Axes, trials: Sequence[FrozenTrial], places: Sequence[Any]) -> None:
    """Draw each trial's last score, in the colour of how it ended."""
    for trial, place in zip(trials, places, strict=True):
        value = score_of(trial)
        colour, filled = _MARKS[STATES[trial.state]]
        if value is not None:
            axes.scatter(place, value, s=28, edgecolor=colour, facecolor=colour if filled else "w")


def _legend(axes: Axes) -> None:
    for state, (colour, filled) in _MARKS.items():
        axes.scatter(
            [], [], s=28, edgecolor=colour, facecolor=colour if filled else "w", label=state
        )
    axes.legend(frameon=False, fontsize=8)


def _png(figure: Any) -> bytes:
    FigureCanvasAgg(figure)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=_DPI, bbox_inches="tight")
    figure.clear()
    return data.getvalue()
