"""Pictures of a sweep, as PNG; parallel coordinates and the front are Optuna's own plots."""

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import optuna
import optuna.visualization.matplotlib as plots
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from pcd_ray.tune.records import STATES, score_of
from pcd_ray.tune.study import history_of

_DPI = 130
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
    of_score: dict[str, Any] = {"target_name": score}
    if cost:
        of_score["target"] = lambda trial: trial.values[0]
    drawn: dict[str, bytes | None] = {}
    if any(map(history_of, trials)):
        drawn["learning_curves.png"] = _learning_curves(trials, score)
    if len(finished) > 1:
        varied = _varied(finished)
        drawn["history.png"] = _history(trials, score)
        drawn["slices.png"] = _slices(trials, varied, score)
        drawn["importance.png"] = _importance(study, finished, **of_score)
        if len(varied) > 1:
            drawn["parallel.png"] = _optunas(
                plots.plot_parallel_coordinate, study, params=varied, **of_score
            )
    if cost and len(finished) > 1:
        names = [score, cost]
        drawn["trade_off.png"] = _optunas(plots.plot_pareto_front, study, target_names=names)
    return {name: png for name, png in drawn.items() if png}


def importances(study: optuna.Study, **of_score: Any) -> dict[str, float]:
    """Return each option's share in what separates the best tenth of trials from the others.

    Empty where the finished trials are too few or all alike. Source: PED-ANOVA (Watanabe et al.,
    IJCAI 2023), as Optuna has it.
    """
    target = of_score.get("target")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # too few trials to tell any apart
            found = get_param_importances(
                study, evaluator=PedAnovaImportanceEvaluator(), target=target, normalize=True
            )
    except (ValueError, RuntimeError, ZeroDivisionError, UserWarning):
        return {}
    return {name: float(share) for name, share in found.items() if share == share}


def _varied(trials: Sequence[FrozenTrial]) -> list[str]:
    """Return the options that all of these trials were asked for and that differ among them."""
    shared = set.intersection(*(set(trial.params) for trial in trials))
    names = [name for name in trials[0].params if name in shared]
    return [n for n in names if len({repr(trial.params[n]) for trial in trials}) > 1] or names


def _optunas(plot: Callable[..., Any], study: optuna.Study, **options: Any) -> bytes:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # our versions are pinned
        axes = plot(study, **options)
        first = axes.flat[0] if hasattr(axes, "flat") else axes
        return _png(first.figure)


def _importance(
    study: optuna.Study, finished: Sequence[FrozenTrial], **of_score: Any
) -> bytes | None:
    shares = importances(study, **of_score)
    if not shares:
        return None
    figure, (axes,) = _panels(1, width=8.0)
    figure.set_figheight(0.5 * len(shares) + 1.2)
    names = list(shares)[::-1]
    axes.barh(names, [shares[name] for name in names], color=_MARKS["finished"][0])
    axes.set_xlabel(f"share in what separates the best of {len(finished)} finished trials")
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
            axes.set_xscale("log" if getattr(distribution, "log", False) else "linear")
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
