"""The page of a comparison: scores side by side, classes, pictures, and how it was measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pcd_ray import storage
from pcd_ray.config import Config, to_yaml
from pcd_ray.evaluate.comparison import (
    JUDGING_SEEDS,
    TEST_IMAGES,
    TRAININGS,
    Estimate,
    Measured,
    bases,
)
from pcd_ray.evaluate.report import Figure, Table, render_report
from pcd_ray.evaluate.run_report import PICTURES
from pcd_ray.evaluate.scores import Scores
from pcd_ray.evaluate.students import Row

TITLES = {
    "knn_top1": "kNN: top-1 %",
    "linear_top1": "Linear probe: top-1 %",
    "linear_top5": "Linear probe: top-5 %",
    "miou": "mIoU %, validation",
    "macc": "Mean class accuracy %, validation",
    "aacc": "Pixel accuracy %, validation",
    "test_miou": "mIoU %, test",
    "test_macc": "Mean class accuracy %, test",
    "test_aacc": "Pixel accuracy %, test",
    "box_ap": "Box AP",
    "mask_ap": "Mask AP",
}
"""Metric -> what a reader is told it is; others go by their own names."""


@dataclass(frozen=True, slots=True)
class Page:
    """What is true of all rows of a comparison."""

    title: str
    sets: Mapping[str, str]
    """Option -> URI of the labelled sets."""
    facts: Mapping[str, Any]
    """How it was measured: all that numbers follow from besides network and seed."""
    notes: Sequence[str]
    """What is worth knowing of the sets."""
    fine_tuned: bool
    """Whether networks were trained to be judged."""


def write_eval_report(  # noqa: PLR0913 - what a page of a comparison holds
    uri: str,
    page: Page,
    *,
    table: Mapping[str, Mapping[str, Estimate]],
    measured: Mapping[str, Measured],
    rows: Sequence[Row],
    failures: Mapping[str, str],
    looks: Mapping[str, bytes],
    config: Config,
) -> None:
    """Write a comparison as one self-contained page.

    Args:
        uri: the page.
        page: what is true of all rows.
        table: metric -> row -> value; the first metric is drawn as bars.
        measured: row -> its measurements, whose first one's pictures and classes are shown.
        rows: what was to be judged.
        failures: what could not be judged or drawn -> why.
        looks: file name -> PNG of what all networks make of the same images.
        config: all options.
    """
    flat = {
        label: [one for training in each for one in training] for label, each in measured.items()
    }
    judged = {label: scores for label, scores in flat.items() if scores}
    text = render_report(
        title=f"{page.title}: {' against '.join(judged) or 'nothing judged'}",
        lead=_lead(judged, page.sets),
        tables=[
            *_scores(table, list(judged)),
            *_classes(judged),
            _networks(rows, measured),
            *_how(page.facts, judged),
        ],
        figures=[*_looks(looks), *_figures(judged)],
        notes=[*_notes(page, table, judged), *_missing(failures)],
        config_yaml=to_yaml(config),
    )
    storage.write_text(uri, text)


def _lead(rows: Mapping[str, Sequence[Scores]], sets: Mapping[str, str]) -> str:
    places = ", ".join(f"{option.removeprefix('eval.')} {uri}" for option, uri in sets.items())
    return (
        f"{len(rows)} networks judged alike on {places}. Distilled students have seen none of the "
        "labels, whatever images they have seen."
    )


def _scores(table: Mapping[str, Mapping[str, Estimate]], labels: Sequence[str]) -> list[Table]:
    if not table:
        return []
    bars = [
        (TITLES.get(metric, metric), *(_number(of.get(label)) for label in labels))
        for metric, of in table.items()
        if metric in TITLES
    ]
    whole = [
        (
            label,
            *(str(of[label]) if label in of else "-" for of in table.values()),
            bases(table, label),
        )
        for label in labels
    ]
    return [
        Table("Side by side", ("", *labels), bars),
        Table("All scores, with 95% intervals", ("", *table, "interval over"), whole),
    ]


def _number(value: Estimate | None) -> str:
    return "-" if value is None else f"{value.value:.1f}"


def _classes(rows: Mapping[str, Sequence[Scores]]) -> list[Table]:
    metrics = dict.fromkeys(m for scores in rows.values() for m in scores[0].classes)
    return [_class_table(metric, rows) for metric in metrics]


def _class_table(metric: str, rows: Mapping[str, Sequence[Scores]]) -> Table:
    columns = {label: scores[0].classes.get(metric, {}) for label, scores in rows.items()}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    cells = [
        (name, *(_cell(column.get(name)) for column in columns.values()))
        for name in names
        if any(column.get(name) is not None for column in columns.values())
    ]
    return Table(f"{TITLES.get(metric, metric)}, by class", ("", *columns), cells)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _networks(rows: Sequence[Row], measured: Mapping[str, Measured]) -> Table:
    header = ("", "from", "licence of the weights", "trainings judged", "measurements", "s each")
    cells = []
    for row in rows:
        trainings = measured[row.label]
        scores = [one for training in trainings for one in training]
        seconds = [one.about.get("seconds", 0) for one in scores]
        licences = dict.fromkeys(network.licence or "not said" for network in row.networks)
        cells.append(
            (
                row.label,
                ", ".join(network.source for network in row.networks),
                "; ".join(licences),
                f"{sum(map(bool, trainings))} of {len(row.networks)}",
                str(len(scores)),
                f"{sum(seconds) / len(seconds):.0f}" if seconds else "-",
            )
        )
    return Table("Networks", header, cells)


def _how(facts: Mapping[str, Any], rows: Mapping[str, Sequence[Scores]]) -> list[Table]:
    """Return how all rows were measured, and what was found or chosen for each."""
    shown = [(_words(name), _value(value)) for name, value in facts.items()]
    own = {
        label: {k: v for k, v in scores[0].about.items() if k not in _TOLD_ELSEWHERE}
        for label, scores in rows.items()
    }
    names = dict.fromkeys(name for about in own.values() for name in about)
    tables = [Table("How it was measured", ("", "all rows"), shown)]
    if names:
        cells = [
            (_words(name), *(_value(about.get(name, "-")) for about in own.values()))
            for name in names
        ]
        tables.append(Table("Found and chosen by row, first measurement", ("", *own), cells))
    return tables


_TOLD_ELSEWHERE = ("confusion", "notes", "seconds", "device")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "none"
    return str(value)


def _looks(looks: Mapping[str, bytes]) -> list[Figure]:
    return [Figure(png, _caption(name)) for name, png in looks.items()]


def _caption(name: str) -> str:
    if name.startswith("attention_"):
        label = name.removeprefix("attention_").removesuffix(".png")
        return f"{label}. {PICTURES['attention_student.png']}"
    return PICTURES[name]


_SHOWN = {
    "confusion.png": "What each true class's pixels of the validation images are taken for.",
    "test_confusion.png": "What each true class's pixels of the test images are taken for.",
    "segmentation.png": "Validation images, their labels, and what is predicted.",
    "detections.png": "Objects of validation images, and what is found.",
    "training.png": "Losses and learning rate of fine-tuning, step by step.",
}
"""Picture of one row -> what it shows."""


def _figures(rows: Mapping[str, Sequence[Scores]]) -> list[Figure]:
    return [
        Figure(png, f"{label}. {_SHOWN.get(name, name)}")
        for label, scores in rows.items()
        for name, png in scores[0].pictures.items()
    ]


_OVER = {
    TEST_IMAGES: "[low, high] is a 95% bootstrap interval over the test images: what another draw "
    "of test images may change, for this one training. A class that a draw shows nothing of keeps "
    "its value in it.",
    JUDGING_SEEDS: "+- over judging seeds is half of Student's 95% interval of their mean, for "
    "this one training; of the pictures and classes the first seed's are shown.",
    TRAININGS: "+- over trainings is half of Student's 95% interval of the mean over trainings, "
    "each one the mean of its judging seeds; of the pictures and classes the first training's are "
    "shown.",
}


def _notes(
    page: Page,
    table: Mapping[str, Mapping[str, Estimate]],
    rows: Mapping[str, Sequence[Scores]],
) -> Iterator[str]:
    over = dict.fromkeys(value.over for of in table.values() for value in of.values())
    yield from (_OVER[kind] for kind in over if kind)
    if page.fine_tuned:
        yield (
            "Every network is fine-tuned as a whole, its backbone under new layers; projection "
            "heads and attention necks are left out."
        )
    else:
        yield (
            "Every network is judged on its frozen backbone alone; projection heads and attention "
            "necks are left out."
        )
    yield from (f"{note[:1].upper()}{note[1:]}." for note in page.notes)
    own = (
        (label, n) for label, each in rows.items() for s in each for n in s.about.get("notes", ())
    )
    yield from dict.fromkeys(f"{label}: {note}." for label, note in own)


def _missing(failures: Mapping[str, str]) -> list[str]:
    return [f"Not judged or drawn: {part} ({why})." for part, why in failures.items()]
