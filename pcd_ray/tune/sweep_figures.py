"""Pictures of a sweep, as PNG."""

import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import optuna
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from optuna.distributions import CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState, create_trial

from pcd_ray.tune.records import STATES, score_of
from pcd_ray.tune.study import history_of

ENOUGH = 10
"""Finished trials from which on importances are told: there is a best tenth."""
_DPI = 130
_IN_A_ROW = 4  # panels
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
        if varied:
            drawn["slices.png"] = _slices(trials, varied, score)
            drawn["importance.png"] = _importance(_of_scores_alone(finished))
        if len(varied) > 1:
            drawn["parallel.png"] = _parallel(finished, varied, score)
    if cost and len(finished) > 1:
        drawn["trade_off.png"] = _trade_off(study, finished, score, cost)
    return {name: png for name, png in drawn.items() if png}


def importances(scored: optuna.Study) -> dict[str, float]:
    """Return each option's share in what separates the best tenth of trials from the others.

    Empty where fewer than ten trials have finished or all are alike. Source: PED-ANOVA (Watanabe et
    al., IJCAI 2023), as Optuna has it.
    """
    if len(scored.trials) < ENOUGH:
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
    """Return the options that differ among trials; not all trials need to have been asked."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    return [n for n in names if len({repr(trial.params.get(n)) for trial in trials}) > 1]


def _parallel(finished: Sequence[FrozenTrial], names: Sequence[str], score: str) -> bytes:
    """Draw each trial as a line through its score and its values, the better the darker."""
    figure, (axes,) = _panels(1, width=max(8.0, 1.7 * (1 + len(names))))
    scores = [trial.values[0] for trial in finished]
    columns = [_on_a_scale(scores, min(scores), max(scores))]
    columns += [_placed(finished, name) for name in names]
    lines = list(zip(*(places for places, _ in columns), strict=True))
    for line in sorted(lines):  # the best on top
        shade = mpl.colormaps["Blues"](0.25 + 0.75 * line[0])
        axes.plot(range(len(columns)), line, "o-", color=shade, linewidth=1.6, markersize=4)
    for column, (_, ticks) in enumerate(columns):
        axes.axvline(column, color="#1c2026", linewidth=0.8, zorder=0)
        for place, text in ticks:
            ground: Any = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
            right: Any = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(text, (column, place), fontsize=9, bbox=ground, zorder=5, **right)
    axes.set_xticks(range(len(columns)), [_in_two(name) for name in (score, *names)])
    axes.set_xlim(-0.15, len(columns) - 0.5)
    axes.set_yticks([])
    axes.tick_params(bottom=False)
    for side in axes.spines.values():
        side.set_visible(False)
    return _png(figure)


def _placed(
    trials: Sequence[FrozenTrial], name: str
) -> tuple[list[float], list[tuple[float, str]]]:
    """Return each trial's place on an option's axis from 0 to 1, NaN: not asked; and its ticks."""
    rule = next(trial.distributions[name] for trial in trials if name in trial.params)
    if isinstance(rule, CategoricalDistribution):
        last = max(1, len(rule.choices) - 1)
        ticks = [(index / last, str(choice)) for index, choice in enumerate(rule.choices)]
        asked = [name in trial.params for trial in trials]
        places = [
            rule.choices.index(trial.params[name]) / last if there else math.nan
            for trial, there in zip(trials, asked, strict=True)
        ]
        return places, ticks
    values = [trial.params.get(name, math.nan) for trial in trials]
    low, high, log = (getattr(rule, each) for each in ("low", "high", "log"))
    return _on_a_scale(values, low, high, log=log)


def _on_a_scale(
    values: Sequence[float], low: float, high: float, *, log: bool = False
) -> tuple[list[float], list[tuple[float, str]]]:
    """Return the places of numbers between two ends, as 0 to 1, and ticks."""
    of = math.log if log else float
    span = (of(high) - of(low)) or 1.0
    marks = LogLocator(subs=(1, 2, 5)) if log else MaxNLocator(5)
    inside = [float(mark) for mark in marks.tick_values(low, high) if low <= mark <= high]
    ticks = [((of(mark) - of(low)) / span, f"{mark:g}") for mark in inside]
    return [(of(value) - of(low)) / span for value in values], ticks


def _in_two(name: str) -> str:
    """Break an option's path before its last part, so that neighbours do not touch."""
    section, dot, option = name.rpartition(".")
    return f"{section}{dot}\n{option}" if dot else name


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
    colour, _ = _MARKS["finished"]
    front = {trial.number for trial in study.best_trials}
    for trial in finished:
        ground = colour if trial.number in front else "w"
        axes.scatter(trial.values[1], trial.values[0], s=28, edgecolor=colour, facecolor=ground)
    best = sorted((trial.values[1], trial.values[0]) for trial in study.best_trials)
    costs, scores = zip(*best, strict=True)
    axes.step(costs, scores, where="post", color="#1c2026", linewidth=1, zorder=0)
    axes.set_xlabel(cost)
    axes.set_ylabel(score)
    _number(
        axes, [(t.values[1], t.values[0], t.number) for t in study.best_trials], offset=(-14, 7)
    )
    return _png(figure)


def _learning_curves(trials: Sequence[FrozenTrial], score: str) -> bytes:
    figure, (axes,) = _panels(1, width=8.0)
    ends = []
    for trial in trials:
        points = sorted(history_of(trial).items())
        if not points:
            continue
        colour, filled = _MARKS[STATES[trial.state]]
        epochs, scores = zip(*points, strict=True)
        axes.plot(epochs, scores, color=colour, alpha=0.7, linewidth=1.2)
        ground = colour if filled else "w"
        axes.scatter(epochs[-1], scores[-1], s=28, edgecolor=colour, facecolor=ground, zorder=3)
        ends.append((*points[-1], trial.number))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel(score)
    _number(axes, ends)
    _legend(axes, trials)
    return _png(figure)


def _number(
    axes: Axes, points: Sequence[tuple[float, float, int]], *, offset: tuple[float, float] = (6, 0)
) -> None:
    """Write trials' numbers beside their points, the highest first, where there is room."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float]] = []
    for x, y, number in sorted(points, key=lambda point: -point[1]):
        place = ((x - left) / (right - left), (y - low) / (high - low))
        if all(abs(place[0] - x0) > 0.04 or abs(place[1] - y0) > 0.045 for x0, y0 in taken):
            axes.annotate(
                str(number), (x, y), xytext=offset, textcoords="offset points", va="center"
            )
            taken.append(place)


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
    _legend(axes, trials)
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
    for axes in all_axes[::_IN_A_ROW]:
        axes.set_ylabel(score)
    _legend(all_axes[-1], trials)
    return _png(figure)


def _panels(count: int, *, width: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels in rows that share their vertical axis."""
    across = min(count, _IN_A_ROW)
    down = -(-count // across)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width * across, 4.0 * down), layout="constrained")
        grid = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
        for unused in grid[count:]:
            unused.remove()
        return figure, list(grid[:count])


def _scatter(axes: Axes, trials: Sequence[FrozenTrial], places: Sequence[Any]) -> None:
    """Draw each trial's last score, in the colour of how it ended."""
    for trial, place in zip(trials, places, strict=True):
        value = score_of(trial)
        colour, filled = _MARKS[STATES[trial.state]]
        if value is not None:
            axes.scatter(place, value, s=28, edgecolor=colour, facecolor=colour if filled else "w")


def _legend(axes: Axes, trials: Sequence[FrozenTrial]) -> None:
    """Explain the marks of trials that have a score."""
    drawn = {STATES[trial.state] for trial in trials if score_of(trial) is not None}
    for state, (colour, filled) in _MARKS.items():
        if state in drawn:
            ground = colour if filled else "w"
            axes.scatter([], [], s=28, edgecolor=colour, facecolor=ground, label=state)
    above: Any = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
    axes.legend(frameon=False, fontsize=8, ncols=len(_MARKS) + 1, **above)


def _png(figure: Any) -> bytes:
    FigureCanvasAgg(figure)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=_DPI, bbox_inches="tight")
    figure.clear()
    return data.getvalue()
