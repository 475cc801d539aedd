"""The page of a comparison: scores side by side, classes, pictures, and how it was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from pcd_ray import storage
from pcd_ray.config import Config, to_yaml
from pcd_ray.evaluate.comparison import Estimate
from pcd_ray.evaluate.report import Figure, Table, render_report
from pcd_ray.evaluate.run_report import PICTURES
from pcd_ray.evaluate.scores import Scores

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


def write_eval_report(  # noqa: PLR0913 - what a page of a comparison holds
    uri: str,
    *,
    title: str,
    table: Mapping[str, Mapping[str, Estimate]],
    rows: Mapping[str, Sequence[Scores]],
    sources: Mapping[str, str],
    failures: Mapping[str, str],
    looks: Mapping[str, bytes],
    sets: Mapping[str, str],
    config: Config,
) -> None:
    """Write a comparison as one self-contained page.

    Args:
        uri: the page.
        title: heading.
        table: metric -> row -> value; the first metric is drawn as bars.
        rows: row -> its measurements, whose first one's pictures and classes are shown.
        sources: row -> where its networks come from.
        failures: what could not be judged -> why.
        looks: file name -> PNG of what all networks make of the same images.
        sets: option -> URI of the labelled sets.
        config: all options.
    """
    judged = {label: scores for label, scores in rows.items() if scores}
    page = render_report(
        title=f"{title}: {' against '.join(judged) or 'nothing judged'}",
        lead=_lead(judged, sets),
        tables=[*_scores(table, list(judged)), *_classes(judged), _networks(judged, sources)],
        figures=[*_looks(looks), *_figures(judged)],
        notes=_notes(table, failures),
        config_yaml=to_yaml(config),
    )
    storage.write_text(uri, page)


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
        (label, *(str(of[label]) if label in of else "-" for of in table.values()))
        for label in labels
    ]
    return [
        Table("Side by side", ("", *labels), bars),
        Table("All scores, with 95% intervals", ("", *table), whole),
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


def _networks(rows: Mapping[str, Sequence[Scores]], sources: Mapping[str, str]) -> Table:
    header = ("", "from", "measurements", "seconds each")
    cells = [
        (
            label,
            sources[label],
            str(len(scores)),
            f"{sum(s.about.get('seconds', 0) for s in scores) / len(scores):.0f}",
        )
        for label, scores in rows.items()
    ]
    return Table("Networks", header, cells)


def _looks(looks: Mapping[str, bytes]) -> list[Figure]:
    return [Figure(png, _caption(name)) for name, png in looks.items()]


def _caption(name: str) -> str:
    if name.startswith("attention_"):
        label = name.removeprefix("attention_").removesuffix(".png")
        return f"{label}. {PICTURES['attention_student.png']}"
    return PICTURES[name]


def _figures(rows: Mapping[str, Sequence[Scores]]) -> list[Figure]:
    return [
        Figure(png, f"{label}: {name.rpartition('.')[0].replace('_', ' ')}")
        for label, scores in rows.items()
        for name, png in scores[0].pictures.items()
    ]


def _notes(
    table: Mapping[str, Mapping[str, Estimate]], failures: Mapping[str, str]
) -> Sequence[str]:
    over: dict[str, Any] = dict.fromkeys(
        value.over for of in table.values() for value in of.values() if value.over
    )
    words = {
        "test images": "+- is half of a 95% bootstrap interval over the test images: what another "
        "draw of test images may change, for this one training.",
        "seeds": "+- is half of Student's 95% interval of the mean over seeds; of the pictures and "
        "classes the first seed's are shown.",
    }
    return [
        *(f"Not judged: {part} ({why})." for part, why in failures.items()),
        *(words[kind] for kind in over),
        "Every network is judged on its frozen or fine-tuned backbone alone; projection heads and "
        "attention necks are left out.",
    ]
