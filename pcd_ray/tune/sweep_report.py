"""The page of a sweep: its best trial, what was tried, which options mattered."""

import json
import statistics
from collections.abc import Sequence

from optuna.trial import TrialState

from pcd_ray import metric_names as names
from pcd_ray import storage
from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config, to_yaml
from pcd_ray.evaluate.figures import loss_curve
from pcd_ray.evaluate.report import Figure, Link, Table, render_report
from pcd_ray.tune.records import TrialRecord, best_trial, trade_offs, trial_name, trial_values
from pcd_ray.tune.space import epochs_of
from pcd_ray.tune.study import OpenStudy
from pcd_ray.tune.sweep_figures import ENOUGH, sweep_figures

UNITS = {
    "knn_top1": "kNN top-1 %",
    "segmentation_miou": "linear probe mIoU %, validation",
}
"""Metric -> what a reader is told it is."""
_COSTS = {"none": "", "training_s": "seconds of training", "parameters": "backbone parameters"}
_ENDS = {"stopped early": "was stopped", "failed": "failed"}
_CURVE = "How training went, as far as it was written down."
_CAPTIONS = {
    "history.png": "Scores in the order of the trials, and the best so far.",
    "learning_curves.png": "How each trial's score grew; numbers are trials.",
    "parallel.png": "Each finished trial is a line through its score and its values; the darker, "
    "the better.",
    "importance.png": "Which options separate the best tenth of the finished trials from the "
    "others (PED-ANOVA). With few trials this is a hint, not a measurement.",
    "slices.png": "Each option alone against the score. Of trials that were stopped early it is "
    "the last score they had, which is no finished trial's.",
    "trade_off.png": "Score against cost; no trial beats the filled ones in both, and the line "
    "joins them.",
}


def write_sweep_report(
    folder: RunFolder, config: Config, opened: OpenStudy, records: Sequence[TrialRecord]
) -> str:
    """Write ``figures/`` and ``report.html`` of a sweep; return the page's URI.

    Finished trials have pages of their own; the others that are over are given one.
    """
    metric, cost = UNITS[config.tune.metric], _COSTS[config.tune.cost]
    _write_pages_of_unfinished(folder, config, records)
    pictures = sweep_figures(opened.study, score=metric, cost=cost)
    for name, png in pictures.items():
        storage.write_bytes(folder.file("figures", name), png)
    page = render_report(
        title=f"Sweep {config.run.name}: {config.student.backbone}",
        lead=_lead(config, opened, records),
        tables=[*_best(opened, metric), _trials(opened, records, metric, cost)],
        figures=[Figure(pictures[name], _CAPTIONS[name]) for name in _CAPTIONS if name in pictures],
        notes=_notes(config, opened, records),
        config_yaml=to_yaml(config),
    )
    uri = folder.file("report.html")
    storage.write_text(uri, page)
    return uri


def _lead(config: Config, opened: OpenStudy, records: Sequence[TrialRecord]) -> str:
    states = [record.state for record in records]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    best = best_trial(opened)
    found = "No trial has finished." if best is None else f"The best is trial {best.number}."
    return f"{len(records)} of {config.tune.trials} trials: {counts or 'none'}. {found}"


def _best(opened: OpenStudy, metric: str) -> list[Table]:
    best = best_trial(opened)
    if best is None:
        return []
    header = ("", f"trial {best.number}", "median of finished trials")
    middle = statistics.median(trial.values[0] for trial in opened.trials(TrialState.COMPLETE))
    return [
        Table("Best", header, [(metric, f"{best.values[0]:.1f}", f"{middle:.1f}")]),
        Table(
            "Options of the best trial",
            ("option", "value"),
            [(name, _short(value)) for name, value in trial_values(best).items()],
        ),
    ]


def _trials(opened: OpenStudy, records: Sequence[TrialRecord], metric: str, cost: str) -> Table:
    options = dict.fromkeys(name for record in records for name in record.values)
    front = set(trade_offs(opened)) if cost else set()
    header = ["trial", "state", metric, *([cost, "on the front"] if cost else []), "epochs"]
    rows = []
    for record in sorted(records, key=lambda r: -(r.score or 0.0)):
        score = "-" if record.score is None else f"{record.score:.1f}"
        priced = ["-" if record.cost is None else f"{record.cost:g}"]
        priced.append("yes" if record.number in front else "")
        rows.append(
            [
                _link(record),
                record.state,
                score,
                *(priced if cost else []),
                str(record.epochs),
                *(_short(record.values.get(name, "-")) for name in options),
            ]
        )
    return Table("Trials", [*header, *options], rows)


def _link(record: TrialRecord) -> str | Link:
    """Link to a trial's own page, which all have that are over."""
    text = str(record.number)
    return Link(text, f"trials/{trial_name(record.number)}/report.html") if record.over else text


def _write_pages_of_unfinished(
    folder: RunFolder, config: Config, records: Sequence[TrialRecord]
) -> None:
    """Write ``report.html`` of each trial that was stopped early or failed, once."""
    for record in records:
        own = RunFolder(folder.file("trials", trial_name(record.number)))
        if record.state in _ENDS and not storage.exists(own.file("report.html")):
            storage.write_text(own.file("report.html"), _page_of_unfinished(own, config, record))


def _page_of_unfinished(own: RunFolder, config: Config, record: TrialRecord) -> str:
    settings, measured = own.file("config.yaml"), own.file("metrics.jsonl")
    text = storage.read_text(measured) if storage.exists(measured) else ""
    lines = [line for line in map(json.loads, text.splitlines()) if names.LOSS in line]
    curve = [Figure(loss_curve(lines), _CURVE)] if lines else []
    score = "-" if record.score is None else f"{record.score:.1f}"
    header, epochs = ("option", "value"), epochs_of(record.values, config)
    return render_report(
        title=f"Sweep {config.run.name}: trial {record.number}, {record.state}",
        lead=f"It {_ENDS[record.state]} after {record.epochs} of {epochs} epochs.",
        tables=[
            Table("Last score", ("", "student"), [(UNITS[config.tune.metric], score)]),
            Table("Options", header, [(n, _short(v)) for n, v in record.values.items()]),
        ],
        figures=curve,
        notes=[record.reason] if record.reason else [],
        config_yaml=storage.read_text(settings) if storage.exists(settings) else "",
    )


def _notes(config: Config, opened: OpenStudy, records: Sequence[TrialRecord]) -> list[str]:
    failed = [f"Trial {r.number} failed: {r.reason}" for r in records if r.reason]
    finished = sum(record.state == "finished" for record in records)
    too_few = (
        f"Which options mattered is told from {ENOUGH} finished trials on; {finished} have "
        "finished. More: the same command with a larger tune.trials."
    )
    judged = config.eval.knn_test if config.tune.metric == "knn_top1" else config.eval.segmentation
    return [
        *failed,
        *([too_few] if finished < ENOUGH else []),
        f"Every trial was judged on {judged}. The best score is the highest of many noisy ones: on "
        "images that chose nothing, the same configuration will score lower.",
        "Each trial was trained once, all with one seed: differences as small as those between "
        "seeds say nothing.",
        f"The study is in {opened.shown_url}; `optuna-dashboard` shows it.",
    ]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
